#!/bin/sh
# What tests need beyond Python packages, from Debian: Chromium, and Prometheus with its promtool. For `make test`.
#
#   docker/install_test_programs.sh [.venv]
#
# Does nothing where they are there. Where it cannot install them (not root, no apt-get, no network) it says so and ends
# well: tests that want them are skipped. Prometheus is unpacked into the environment's bin and not installed, since
# Debian's package brings a service that starts at once.
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

for program in chromium prometheus; do
    { command -v $program >/dev/null || [ -x "$venv/bin/$program" ]; } && continue
    if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        echo "installing $program from Debian" >&2
        # Lists of packages may be missing, or name versions that are gone.
        { install_$program || { apt-get update --quiet && install_$program; }; } >&2 && continue
        echo "$program: not installed; tests that need it are skipped" >&2
    else
        echo "$program: not installed, which takes apt-get as root; tests that need it are skipped" >&2
    fi
done
