#!/bin/sh
# What tests need beyond Python packages, from Debian: Chromium, Prometheus with its promtool, and a container engine. For
# `make test`.
#
#   docker/install_test_programs.sh [.venv]
#
# Does nothing where they are there. Where it cannot install them (not root, no apt-get, no network) it says so and ends
# well: tests that want them are skipped. Prometheus is unpacked into the environment's bin and not installed, since
# Debian's package brings a service that starts at once. The container engine is unpacked into the environment's
# containers, where tests/engine/containers.py finds it: installed, it would upgrade packages that the machine runs on.
set -u
venv=$(cd "${1:-.venv}" && pwd) || exit 1
export DEBIAN_FRONTEND=noninteractive

install_chromium() {
    apt-get install --yes --quiet --no-install-recommends chromium fonts-liberation
}

install_prometheus() {
    folder=$(mktemp -d) || return 1
    (cd "$folder" && apt-get download --quiet prometheus) &&
        dpkg -x "$folder"/prometheus_*.deb "$folder/root" &&
        cp "$folder/root/usr/bin/prometheus" "$folder/root/usr/bin/promtool" "$venv/bin/"
    copied=$?
    rm -rf "$folder"
    return $copied
}

install_containers() {
    folder=$(mktemp -d) || return 1
    (cd "$folder" && apt-get download --quiet podman buildah catatonit crun conmon netavark aardvark-dns debootstrap \
        golang-github-containers-common golang-github-containers-image libsubid4 libgpgme11 libyajl2 \
        iptables libip4tc2 libip6tc2 libxtables12 libnfnetlink0 libnetfilter-conntrack3 libnftnl11 libmnl0) &&
        for package in "$folder"/*.deb; do dpkg -x "$package" "$folder/root" || break; done &&
        for name in iptables iptables-save iptables-restore ip6tables; do
            ln -sf xtables-nft-multi "$folder/root/usr/sbin/$name" || break
        done &&
        rm -rf "$venv/containers" && mv "$folder/root" "$venv/containers"
    moved=$?
    rm -rf "$folder"
    return $moved
}

for program in chromium prometheus containers; do
    { command -v $program >/dev/null || [ -x "$venv/bin/$program" ] || [ -d "$venv/$program" ]; } && continue
    if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        echo "installing $program from Debian" >&2
        # Lists of packages may be missing, or name versions that are gone.
        { install_$program || { apt-get update --quiet && install_$program; }; } >&2 && continue
        echo "$program: not installed; tests that need it are skipped" >&2
    else
        echo "$program: not installed, which takes apt-get as root; tests that need it are skipped" >&2
    fi
done
