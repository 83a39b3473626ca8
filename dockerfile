# The GLM-ASR server: vLLM's own image, our model code and bundled checkpoint, and vLLM patched to know them.
#   GPU: docker build -t vllm-glmasr:latest .
#   CPU: docker build -t vllm-glmasr:cpu --build-arg BASE_IMAGE=vllm/vllm-openai-cpu:v0.32.0 .
ARG BASE_IMAGE=vllm/vllm-openai:v0.32.0
FROM ${BASE_IMAGE}
WORKDIR /app

# vLLM's audio decoders: its CPU image has them, its CUDA image leaves them out (LGPL). onnxruntime finds speech.
# Nothing is fetched where they are there already.
RUN python3 -c "import av, onnxruntime, scipy, soundfile, soxr" 2>/dev/null || \
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir --root-user-action ignore \
    av onnxruntime scipy soundfile soxr
# The model that finds speech; nothing else of its package is used, nor what that asks for.
RUN python3 -c "from importlib.metadata import version; assert version('silero-vad') == '6.2.3'" 2>/dev/null || \
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir --root-user-action ignore --no-deps silero-vad==6.2.3

# Weights lying in model/ at build time are baked in; docker-compose.yaml mounts the directory over them.
COPY model model
COPY checkpoint checkpoint
# Its links into model/ become files, so that any directory can be mounted over model/.
RUN for link in $(find checkpoint -type l); do cp --remove-destination "$(readlink -f "$link")" "$link"; done

# python3 is the interpreter that holds vLLM in both images (/usr/bin in one, /opt/venv in the other).
COPY server server
RUN python3 server/registry.py

EXPOSE 8300
# vLLM binds the port early but listens, and so answers /health, only when the engine is up and its routes are
# in place; a dead engine answers 503. Plain http.client: no curl needed, and no http_proxy in the way.
HEALTHCHECK --interval=5s --timeout=10s --start-period=20m --retries=3 CMD ["python3", "-ISc", "\
import http.client, os, sys; \
host = os.environ.get('HOST') or '0.0.0.0'; \
server = http.client.HTTPConnection({'0.0.0.0': '127.0.0.1', '::': '::1'}.get(host, host), int(os.environ.get('PORT') or 8300), timeout=8); \
server.request('GET', '/health'); \
sys.exit(server.getresponse().status != 200)"]
ENTRYPOINT ["python3", "server/serve.py"]
