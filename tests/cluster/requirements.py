"""What a machine must have for the control plane beside the peer, and the mark that skips where it has not."""

from __future__ import annotations

import pytest

from tests.lab.requirements import PROGRAMS, lacking

_LACKING = lacking((*PROGRAMS, "etcd", "openssl", "iptables"))

needs_control_plane = pytest.mark.skipif(_LACKING is not None, reason=_LACKING or "")
