"""Transcribes recordings through a running server with the official openai client (chat completions).

    python test_vllm_api.py [--base-url URL] [--api-key KEY] [files…]

Without files it takes wavs/. Where a text file lies beside a recording, the transcript must equal it.
The exit status is 1 if any file failed.
"""

import argparse
import base64
import io
import sys
import time
from pathlib import Path

import librosa
import openai
import soundfile

ROOT = Path(__file__).resolve().parent
SAMPLING_RATE = 16000  # Hz
INSTRUCTION = "Please transcribe this audio."


def as_wav(path: Path) -> str:
    """The recording at 16 kHz with one channel, as base64 WAV."""
    waveform, rate = soundfile.read(path, dtype="float32", always_2d=True)
    waveform = waveform.mean(axis=1)
    if rate != SAMPLING_RATE:
        waveform = librosa.resample(waveform, orig_sr=rate, target_sr=SAMPLING_RATE)
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, SAMPLING_RATE, format="WAV", subtype="PCM_16")
    return base64.b64encode(buffer.getvalue()).decode()


def transcribe(client: openai.OpenAI, model: str, path: Path, instruction: str) -> str:
    """The server's greedy answer to the recording and the instruction."""
    content = [
        {"type": "input_audio", "input_audio": {"data": as_wav(path), "format": "wav"}},
        {"type": "text", "text": instruction},
    ]
    completion = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": content}], temperature=0
    )
    return completion.choices[0].message.content


def check(client: openai.OpenAI, model: str, path: Path, instruction: str) -> bool:
    """Prints file, transcript and, where there is one, the expected text; False if they differ."""
    began = time.monotonic()
    try:
        text = transcribe(client, model, path, instruction)
    except (openai.OpenAIError, soundfile.LibsndfileError) as error:
        print(f"{path}\n  FAILED      {error}")
        return False
    print(f"{path}  ({time.monotonic() - began:.2f} s)\n  transcript  {text}")
    beside = path.with_suffix(".txt")
    if instruction != INSTRUCTION or not beside.is_file():
        return True
    expected = beside.read_text(encoding="utf-8").strip()
    print(f"  expected    {expected}")
    if text != expected:
        print("  DIFFERENT")
    return text == expected


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="recordings (default: wavs/*.wav)")
    parser.add_argument("--base-url", default="http://localhost:8300/v1")
    parser.add_argument("--api-key", default="EMPTY")
    parser.add_argument("--model", help="default: the first that the server names")
    parser.add_argument("--instruction", default=INSTRUCTION)
    args = parser.parse_args()

    client = openai.OpenAI(base_url=args.base_url, api_key=args.api_key)
    try:
        model = args.model or client.models.list().data[0].id
    except openai.OpenAIError as error:
        print(f"{args.base_url}: {error} Is the server running? Start it with: make serve", file=sys.stderr)
        return 1
    files = args.files or sorted((ROOT / "wavs").glob("*.wav"))
    right = [check(client, model, path, args.instruction) for path in files]
    print(f"{sum(right)} of {len(files)} right")
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
