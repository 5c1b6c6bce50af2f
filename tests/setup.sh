#!/usr/bin/env bash
# Installs what the commands of the Makefile need, on Debian 12 and its like: distribution packages (and those named as
# arguments) if one is missing, and .venv, made anew when the dependencies change. Does nothing when everything is there.
set -euo pipefail
cd "$(dirname "$0")/.."

# bcc is not on PyPI; linux-libc-dev has the UAPI headers it compiles with; the rest is the lab, the control plane of its
# cluster and the checks.
packages=(python3-bpfcc linux-libc-dev python3-venv iproute2 nftables conntrack iptables etcd-server openssl
	gcc libc6-dev shellcheck "$@")

missing=()
for package in "${packages[@]}"; do
	dpkg-query -W -f='${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii' || missing+=("$package")
done
if ((${#missing[@]})); then
	echo "installing ${missing[*]}"
	if ((EUID != 0)); then
		echo "run as root, or install them by hand: apt-get install ${missing[*]}" >&2
		exit 1
	fi
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

# The distribution's Python, because the distribution's bcc belongs to it.
stamp=$(cat pyproject.toml constraints.txt tests/setup.sh | sha256sum | cut -d' ' -f1)
if [[ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ]]; then
	echo "making .venv"
	rm -rf .venv
	/usr/bin/python3 -m venv --system-site-packages .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	echo "$stamp" >.venv/stamp
fi
