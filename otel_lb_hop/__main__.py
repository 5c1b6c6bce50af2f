"""`python -m otel_lb_hop` is the same as the command `otel-lb-hop`."""

import sys

from otel_lb_hop.cli import main

sys.exit(main())
