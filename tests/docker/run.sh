#!/bin/bash
# The docker test: the image is built, the service brought up by docker-compose with the profile cpu, asked by
# the openai client and by curl, and brought down. As root, on a machine without an engine, it installs one,
# starts it with everything it keeps in a temporary directory, and stops it. No image is pulled: standin.sh
# makes the base image. Environment:
#   BASE_IMAGE       the base to build on instead of the stand-in, say vllm/vllm-openai-cpu:v0.32.0
#   COMPOSE          docker-compose (default), or "docker compose"
#   ENGINE_DATA      a directory for the engine's data, to be kept: the next run finds the stand-in in it
#   HEALTHY_WITHIN_S seconds from `up` to healthy (default 300)
set -euo pipefail
cd "$(dirname "$0")/../.."

container=vllm-glmasr-cpu
standin=vllm-openai-cpu-standin
compose=${COMPOSE:-docker-compose}
healthy_within_s=${HEALTHY_WITHIN_S:-300}
export COMPOSE_PROJECT_NAME=glmasr-docker-test PORT=${PORT:-18300} MODEL_DIR
work=$(mktemp -d "${TMPDIR:-/tmp}/glmasr-docker.XXXXXX")
MODEL_DIR=$work/model # mounted over /app/model: empty, as with weights that are still to be downloaded
mkdir "$MODEL_DIR"
engine=   # process id of the engine, if this script starts it
images=() # what this script makes in an engine that was there before

say() { echo "docker test [$SECONDS s] $*"; }
fail() { say "FAILED: $*"; exit 1; }

clean_up() {
    local status=$?
    set +e
    if docker info >/dev/null 2>&1; then
        if [ $status -ne 0 ] && docker inspect "$container" >/dev/null 2>&1; then
            say "logs of $container:"
            docker inspect --format '{{json .State}}' "$container"
            docker logs --tail 200 "$container" 2>&1
        fi
        $compose --profile cpu down --timeout 20 >/dev/null 2>&1
        [ -z "$engine" ] && [ ${#images[@]} -gt 0 ] && docker image rm "${images[@]}" >/dev/null 2>&1
    fi
    if [ -n "$engine" ]; then
        kill "$engine" 2>/dev/null
        wait "$engine" 2>/dev/null
        say "engine stopped"
    fi
    rm -rf "$work"
    [ $status -eq 0 ] && say "passed" || say "failed"
    exit $status
}
trap clean_up EXIT
trap 'exit 130' INT TERM

# --- an engine ----------------------------------------------------------------------------------------------
engine_answers() { timeout 10 docker info >/dev/null 2>&1; }

if ! engine_answers; then
    [ "$(id -u)" = 0 ] || fail "no docker engine answers, and only root can start one"
    missing=()
    command -v dockerd >/dev/null || missing+=(docker.io)
    command -v docker-compose >/dev/null || missing+=(docker-compose)
    command -v debootstrap >/dev/null || missing+=(debootstrap)
    if [ ${#missing[@]} -gt 0 ]; then
        say "installing ${missing[*]}"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
            >"$work/apt.log" 2>&1 || { tail -30 "$work/apt.log"; fail "apt-get"; }
    fi
fi
if ! engine_answers; then # where apt has not started it
    say "starting an engine"
    export DOCKER_HOST=unix://$work/docker.sock
    setsid dockerd --host "$DOCKER_HOST" --pidfile "$work/docker.pid" --exec-root "$work/exec" \
        --data-root "${ENGINE_DATA:-$work/data}" >"$work/dockerd.log" 2>&1 &
    engine=$!
    for _ in $(seq 60); do
        engine_answers && break
        kill -0 "$engine" 2>/dev/null || break
        sleep 1
    done
    engine_answers || { tail -30 "$work/dockerd.log"; fail "dockerd does not answer"; }
fi
docker buildx version >/dev/null 2>&1 || export DOCKER_BUILDKIT=${DOCKER_BUILDKIT:-0} # Debian's engine comes without

# --- the image ----------------------------------------------------------------------------------------------
if [ -z "${BASE_IMAGE:-}" ]; then
    if ! docker image inspect "$standin" >/dev/null 2>&1; then
        make .venv/.ready
        say "making the stand-in base image"
        images+=("$standin")
        tests/docker/standin.sh "$standin"
    fi
    BASE_IMAGE=$standin
fi
in_image() { docker run --rm --entrypoint "$1" "$image" "${@:2}"; }

image=$BASE_IMAGE
say "base image: vLLM $(in_image python3 -c 'from importlib.metadata import version; print(version("vllm"))')"
registered='from vllm.model_executor.models import ModelRegistry
raise SystemExit("GlmasrForConditionalGeneration" not in ModelRegistry.get_supported_archs())'
! in_image python3 -c "$registered" 2>/dev/null || fail "the base image's vLLM is patched already"

say "docker build"
image=vllm-glmasr:cpu
images=("$image" "${images[@]}")
docker build --build-arg "BASE_IMAGE=$BASE_IMAGE" -t "$image" . >"$work/build.log" 2>&1 ||
    { cat "$work/build.log"; fail "docker build"; }
in_image python3 -c "$registered" || fail "vLLM in the image is not patched"
in_image python3 server/registry.py --check || fail "registry.py --check in the image"

# --- the service --------------------------------------------------------------------------------------------
say "$compose --profile cpu up"
$compose config --quiet # the GPU service cannot run here, but its description must be valid
CPU_BASE_IMAGE=$BASE_IMAGE $compose --profile cpu up -d --build >"$work/up.log" 2>&1 || { cat "$work/up.log"; fail "up"; }
since=$SECONDS
[ "$(docker ps --quiet | wc -l)" -ge 1 ] || fail "nothing runs"
! docker inspect vllm-glmasr >/dev/null 2>&1 || fail "--profile cpu has made the GPU service's container too"
health=starting
until [ "$health" = healthy ]; do
    [ $((SECONDS - since)) -lt "$healthy_within_s" ] || fail "$health after $healthy_within_s s"
    sleep 1
    state=$(docker inspect --format '{{.State.Status}} {{.RestartCount}} {{.State.Health.Status}}' "$container")
    health=${state##* }
    [[ $state == "running 0 "* ]] || fail "the container is not running: $state"
    [ "$health" != unhealthy ] || fail "unhealthy"
done
say "healthy after $((SECONDS - since)) s"

dangling=$(docker exec "$container" find /app -xtype l)
[ -z "$dangling" ] || fail "dangling links in the image: $dangling"
# Empty settings count as unset; an empty CUDA_VISIBLE_DEVICES would hide every GPU.
! docker exec "$container" grep -qz '^CUDA_VISIBLE_DEVICES=$' /proc/1/environ ||
    fail "the server runs with an empty CUDA_VISIBLE_DEVICES"

say "test_vllm_api.py"
python=.venv/bin/python
[ -x "$python" ] || python=python3
$python test_vllm_api.py --base-url "http://localhost:$PORT/v1" --api-key EMPTY

say "curl"
for wav in wavs/*.wav; do
    printf '{"model": "glm-asr-eligant", "temperature": 0, "messages": [{"role": "user", "content": [
        {"type": "input_audio", "input_audio": {"format": "wav", "data": "%s"}},
        {"type": "text", "text": "Please transcribe this audio."}]}]}' "$(base64 -w0 "$wav")" >"$work/request.json"
    curl --silent --show-error --noproxy '*' --max-time 120 -H 'Content-Type: application/json' \
        --data-binary "@$work/request.json" "http://localhost:$PORT/v1/chat/completions" >"$work/answer.json"
    $python - "$work/answer.json" "${wav%.wav}.txt" <<'PY' || fail "$wav"
import json, pathlib, sys
answer, expected = (pathlib.Path(path).read_text().strip() for path in sys.argv[1:])
assert "choices" in json.loads(answer), answer
text = json.loads(answer)["choices"][0]["message"]["content"].strip()
print(f"  {text}" if text == expected else f"  got      {text!r}\n  expected {expected!r}")
raise SystemExit(text != expected)
PY
done

say "the page"
for path in / /page/main.js; do
    curl --silent --show-error --fail --noproxy '*' --output /dev/null "http://localhost:$PORT$path" || fail "no $path"
done

say "$compose down"
$compose --profile cpu down --timeout 20
! docker inspect "$container" >/dev/null 2>&1 || fail "the container is still there"
