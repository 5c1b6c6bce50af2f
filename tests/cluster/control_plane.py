"""etcd and kube-apiserver on the lab's mgmt host, and what tests do with them."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal as signals
import subprocess
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import yaml

from tests.cluster import audit, objects
from tests.cluster.api import Api, collection_of, path_of
from tests.cluster.kube_proxy import KubeProxy, Mode
from tests.lab.agent import ROOT
from tests.lab.waiting import wait_for
from tests.peers import build

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.cluster.api import Answer, Object
    from tests.lab import Lab, Node

PORT = 6443
SERVICE_CIDRS = "10.96.0.0/16,fd00:96::/112"
ADMIN, ADMIN_TOKEN = "admin", "admin-token"
PROXY_TOKEN = "proxy-token"  # noqa: S105 - of a server that lives for a test
USERS = f'{ADMIN_TOKEN},{ADMIN},1,"system:masters"\n{PROXY_TOKEN},system:kube-proxy,2\n'
"""The static tokens: kube-proxy is bound to its ClusterRole by its name."""

RBAC = ROOT / "deploy" / "rbac.yaml"
CLUSTER_UID_ROLE = "otel-lb-hop-cluster-uid"
AGENT_NAMESPACE = AGENT_ACCOUNT = "otel-lb-hop"
AGENT = f"system:serviceaccount:{AGENT_NAMESPACE}:{AGENT_ACCOUNT}"
"""The agent, as the audit log names it."""

_AS_POD = """
lab=$1 files=$2 account=/run/secrets/kubernetes.io/serviceaccount; shift 2
mount --rbind "$lab" /mnt; mount -t tmpfs tmpfs /run
mkdir -p "$lab" "$account"; mount --rbind /mnt "$lab"; mount --bind "$files" "$account"
exec "$@"
"""
"""A private /run (/var/run is the same) that has the lab's directory, and the ServiceAccount's files at their place."""


class AsPod(NamedTuple):
    """How to start an agent that finds the API server as in a pod: words before its command, and variables."""

    prefix: tuple[str, ...]
    settings: dict[str, str]
    token: Path
    """The file that a kubelet would renew."""


class ControlPlane:
    """An API server with RBAC on the lab's mgmt host. Use it as a context; the lab's end removes what is left.

    It has the objects of deploy/rbac.yaml, but for the right that may be left out.
    """

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.folder = lab.directory / "cluster"
        self.proxies: list[KubeProxy] = []
        self._address = lab.mgmt.address4
        self._certificate = self.folder / "tls.crt"
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._marks = 0
        self._kubeconfigs = 0
        self.api = Api(lab.mgmt, self._address, PORT, self._certificate)

    def __enter__(self) -> Self:
        try:
            self._prepare()
            self._run_etcd()
            self.start()
            self.apply(*(right for right in _rights() if right["metadata"]["name"] != CLUSTER_UID_ROLE))
            wait_for("the rights of the agent", lambda: self._agent_may("list", "services"))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def start(self) -> None:
        """Start the API server and wait until it is ready."""
        key, certificate = self.folder / "tls.key", self._certificate
        self._spawn(
            "kube-apiserver",
            build.build("kubernetes") / "kube-apiserver",
            "--etcd-servers=http://127.0.0.1:2379",
            f"--bind-address={self._address}",
            f"--secure-port={PORT}",
            f"--tls-cert-file={certificate}",
            f"--tls-private-key-file={key}",
            f"--service-account-key-file={certificate}",
            f"--service-account-signing-key-file={key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-cluster-ip-range={SERVICE_CIDRS}",
            f"--token-auth-file={self.folder / 'users.csv'}",
            "--authorization-mode=RBAC",
            # It would refuse pods whose ServiceAccount has no token yet; there are no pods.
            "--disable-admission-plugins=ServiceAccount",
            f"--audit-policy-file={self.folder / 'audit.yaml'}",
            f"--audit-log-path={self._audit_log}",
            "--profiling=false",
            # On SIGTERM watches are ended, not kept for a minute.
            "--shutdown-watch-termination-grace-period=1s",
        )
        wait_for("a kube-apiserver that is ready", self._ready, 30)

    def stop(self, signal: signals.Signals = signals.SIGTERM) -> None:
        """End the API server: on SIGTERM it takes leave of its watchers, on SIGKILL it does not."""
        self._terminate("kube-apiserver", signal)

    def restart(self, signal: signals.Signals = signals.SIGTERM) -> None:
        """End the API server and start it again."""
        self.stop(signal)
        self.start()

    def apply(self, *contents: Object) -> None:
        """Make objects be as told, there before or not; their `status` too. What an earlier apply told is replaced."""
        with self.api.session(ADMIN_TOKEN) as session:
            for content in contents:
                session.apply(content)

    def delete(self, *contents: Object) -> None:
        """Delete objects, known by their kind and name."""
        with self.api.session(ADMIN_TOKEN) as session:
            for content in contents:
                session.want("DELETE", path_of(content))

    def objects_of(self, version: str, kind: str) -> list[Object]:
        """List all objects of a kind as they are now, not as a cache has them."""
        with self.api.session(ADMIN_TOKEN) as session:
            items: list[Object] = session.want("GET", collection_of(version, kind))["items"]
        return items

    def ask(self, method: str, path: str, token: str, content: Object | None = None) -> Answer:
        """Make one request with somebody's token, whatever becomes of it."""
        with self.api.session(token) as session:
            return session.ask(method, path, content)

    def audit(self, user: str | None = None) -> list[audit.Request]:
        """Every request so far, in the order they came, of one user or of all."""
        lines = self._audit_log.read_text(encoding="utf-8").splitlines(keepends=True)
        # The last line may be half written.
        seen = audit.requests(line for line in lines if line.endswith("\n"))
        return [request for request in seen if user in {None, request.user}]

    def allow_cluster_uid(self) -> None:
        """Give the agent the right that an operator may leave out."""
        self.apply(*(right for right in _rights() if right["metadata"]["name"] == CLUSTER_UID_ROLE))
        wait_for("the right to the cluster's uid", lambda: self._agent_may("get", "namespaces", "kube-system"))

    def agent_token(self, seconds: int = 3600) -> str:
        """Make a token of the agent's ServiceAccount, as a kubelet does; it is good for 600 seconds at least."""
        path = f"/api/v1/namespaces/{AGENT_NAMESPACE}/serviceaccounts/{AGENT_ACCOUNT}/token"
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"expirationSeconds": seconds},
        }
        with self.api.session(ADMIN_TOKEN) as session:
            token: str = session.want("POST", path, body)["status"]["token"]
        return token

    def kubeconfig(self, token: str, server: str | None = None) -> Path:
        """Write a kubeconfig with this token, for this API server or what stands in front of it."""
        self._kubeconfigs += 1
        path = self.folder / f"kubeconfig-{self._kubeconfigs}"
        cluster = {
            "server": server or f"https://{self._address}:{PORT}",
            "certificate-authority": str(self._certificate),
        }
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "lab", "cluster": cluster}],
            "users": [{"name": "user", "user": {"token": token}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "user"}}],
            "current-context": "lab",
        }
        path.write_text(json.dumps(document), encoding="utf-8")
        return path

    def agent_settings(self, server: str | None = None) -> dict[str, str]:
        """Name the variables that make an agent read this API server, by a kubeconfig."""
        return {"OTEL_LB_HOP_KUBERNETES": "on", "KUBECONFIG": str(self.kubeconfig(self.agent_token(), server))}

    def agent_as_pod(self) -> AsPod:
        """Say how to start an agent that finds the API server by its ServiceAccount's files, as in a pod."""
        account = self.folder / "account"
        account.mkdir(exist_ok=True)
        token = account / "token"
        token.write_text(self.agent_token(), encoding="ascii")
        (account / "namespace").write_text(AGENT_NAMESPACE, encoding="ascii")
        shutil.copy(self._certificate, account / "ca.crt")
        settings = {"KUBERNETES_SERVICE_HOST": self._address, "KUBERNETES_SERVICE_PORT": str(PORT)}
        return AsPod(
            ("unshare", "--mount", "sh", "-ec", _AS_POD, "sh", str(self.lab.directory), str(account)), settings, token
        )

    @contextlib.contextmanager
    def kube_proxies(self, nodes: Sequence[Node], mode: Mode) -> Iterator[None]:
        """Run kube-proxy on these nodes, whose Node objects must be there; all rules are in place on entry."""
        with contextlib.ExitStack() as stack:
            for node in nodes:
                proxy = KubeProxy(node, mode, self.kubeconfig(PROXY_TOKEN), self.folder)
                stack.callback(proxy.stop)
                self.proxies.append(proxy)
                stack.callback(self.proxies.remove, proxy)
            self.settle()
            yield

    def settle(self) -> None:
        """Wait until every kube-proxy has rules for all that was applied so far.

        Each kind of object reaches it in order, and rules need both a Service and a slice: once those of a new Service
        are there, so are those of everything before it.
        """
        self._marks += 1
        addresses = {4: f"198.18.{self._marks >> 8}.{self._marks & 255}", 6: f"fd00:198::{self._marks:x}"}
        ports = [objects.port(9)]
        name = f"mark-{self._marks}"
        mark = objects.service(name, ports, kind="ClusterIP", families=(4, 6))
        slices = [
            objects.endpoint_slice(name, ports, [{"addresses": [address]}], family=family)
            for family, address in addresses.items()
        ]
        self.apply(mark, *slices)
        for proxy in self.proxies:
            wait_for(f"rules of {proxy.node.name}", partial(proxy.has, addresses.values()), 30)
        self.delete(mark, *slices)

    @property
    def _audit_log(self) -> Path:
        return self.folder / "audit.log"

    def _agent_may(self, verb: str, resource: str, name: str = "") -> bool:
        """Ask the authorizer, which learns of new rights a moment after they are written."""
        attributes = {"verb": verb, "resource": resource, "name": name}
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview"}
        spec = {"user": AGENT, "resourceAttributes": attributes}
        with self.api.session(ADMIN_TOKEN) as session:
            path = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
            return bool(session.want("POST", path, review | {"spec": spec})["status"]["allowed"])

    def _prepare(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        (self.folder / "users.csv").write_text(USERS, encoding="ascii")
        policy = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": [{"level": "Metadata"}]}
        (self.folder / "audit.yaml").write_text(json.dumps(policy), encoding="ascii")
        kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
        name = ["-subj", "/CN=lab", "-addext", f"subjectAltName=IP:{self._address},IP:127.0.0.1"]
        files = ["-keyout", str(self.folder / "tls.key"), "-out", str(self._certificate)]
        command = ["openssl", "req", "-x509", *kind, *name, *files]
        subprocess.run(command, check=True, capture_output=True)

    def _run_etcd(self) -> None:
        client, peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
        urls = [f"--listen-client-urls={client}", f"--advertise-client-urls={client}", f"--listen-peer-urls={peer}"]
        # The API server waits for it.
        self._spawn("etcd", Path("etcd"), f"--data-dir={self.folder / 'etcd'}", "--unsafe-no-fsync", *urls)

    def _ready(self) -> bool:
        process = self._processes["kube-apiserver"]
        log = self.folder / "kube-apiserver.log"
        assert process.poll() is None, f"kube-apiserver ended with {process.returncode}:\n{log.read_text()[-2000:]}"
        try:
            return self.ask("GET", "/readyz", ADMIN_TOKEN).status == 200
        except OSError:
            return False

    def _spawn(self, name: str, program: Path, *words: str) -> None:
        with (self.folder / f"{name}.log").open("a") as log:
            self._processes[name] = self.lab.mgmt.popen([str(program), *words], stdout=log, stderr=log)

    def _terminate(self, name: str, signal: signals.Signals) -> None:
        process = self._processes.pop(name, None)
        if process is None:
            return
        process.send_signal(signal)
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()

    def _end(self) -> None:
        # Nothing of theirs is needed any more: not worth a good-bye.
        for name in list(self._processes):
            self._terminate(name, signals.SIGKILL)


def _rights() -> list[Object]:
    return list(yaml.safe_load_all(RBAC.read_text(encoding="utf-8")))
