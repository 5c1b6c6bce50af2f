"""The matrix of kernels: chosen tests in a small virtual machine under each of them, and here (`make test-kernels`)."""
