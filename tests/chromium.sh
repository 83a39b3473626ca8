#!/bin/bash
# The browser that tests/test_page.py drives: where there is none, root installs Debian's chromium and chromium-driver.
set -euo pipefail
missing=()
command -v chromium >/dev/null || missing+=(chromium)
command -v chromedriver >/dev/null || missing+=(chromium-driver)
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "chromium: the tests of the page need ${missing[*]}, and only root can install them; on Debian: sudo apt-get install ${missing[*]}" >&2
    exit 1
fi
echo "chromium: installing ${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
    >"$log" 2>&1 || { tail -30 "$log" >&2; echo "chromium: apt-get failed" >&2; exit 1; }
