/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* bcc's helpers.h asks for these two. */
#define CONFIG_BPF_SYSCALL 1
#define CONFIG_64BIT 1
/* Keeps bcc's own copy of linux/bpf.h from being read a second time. */
#define __LINUX_BPF_H__ 1
