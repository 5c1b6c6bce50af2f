from __future__ import annotations

import subprocess
import sys


def run(code: str) -> str:
    """Run code in an interpreter of its own and return what it printed."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_only_what_is_needed_is_loaded() -> None:
    """The agent's netlink room loads no network database and no unittest, also once it has been used."""
    used = "from otel_lb_hop.kernel.netlink import Netlink; n = Netlink(); n.links(); n.routes(); n.close()"
    loaded = "import sys; print([name for name in ('pyroute2.ndb.main', 'sqlite3', 'pyroute2') if name in sys.modules])"
    assert run(f"{used}; {loaded}") == "[]"


def test_the_package_is_whole_for_others() -> None:
    """Whoever imports the package afterwards gets all of it, and the parts that are already there are the same."""
    code = (
        "from otel_lb_hop.kernel.netlink import IPRoute, NetlinkError; import pyroute2;"
        "print(pyroute2.NetlinkError is NetlinkError, hasattr(pyroute2, 'NDB'), pyroute2.IPRoute is IPRoute)"
    )
    assert run(code) == "True True True"


def test_a_loaded_package_is_left_alone() -> None:
    """A package that is there already is used as it is."""
    code = (
        "import pyroute2; from otel_lb_hop.slim_import import without_package_init;"
        "import sys\nwith without_package_init('pyroute2'): pass\nprint(sys.modules['pyroute2'] is pyroute2)"
    )
    assert run(code) == "True"
