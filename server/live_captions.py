"""Live captions in the terminal, as an example of the client: speak into the microphone, or play a recording.

    python server/live_captions.py                        the microphone (pip install sounddevice)
    python server/live_captions.py wavs/en_french.wav     a recording, at the pace of speech
"""

import argparse
import asyncio
import base64
import sys
from collections.abc import AsyncIterator

import soundfile
import soxr
from openai import AsyncOpenAI
from openai.resources.realtime.realtime import AsyncRealtimeConnection

RATE = 24000  # Hz, 16 bits, mono
PIECE_S = 0.1
SILENCE_S = 1.0  # behind a recording, so that its last turn ends
PATIENCE_S = 60.0  # for the last texts


async def microphone() -> AsyncIterator[bytes]:
    """Until Ctrl-C."""
    try:
        import sounddevice
    except (ImportError, OSError) as error:
        sys.exit(f"live_captions: the microphone needs `pip install sounddevice` (and PortAudio: apt-get install libportaudio2): {error}")
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def take(data, *_) -> None:
        loop.call_soon_threadsafe(heard.put_nowait, bytes(data))

    with sounddevice.RawInputStream(RATE, int(PIECE_S * RATE), dtype="int16", channels=1, callback=take):
        print("listening; Ctrl-C ends", file=sys.stderr)
        while True:
            yield await heard.get()


async def recording(path: str, pace: float) -> AsyncIterator[bytes]:
    """A sound file in pieces, `pace` times as fast as it was spoken."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    data = (soxr.resample(samples.mean(axis=1), rate, RATE) * 32767).astype("<i2").tobytes() + bytes(2 * int(SILENCE_S * RATE))
    size = 2 * int(PIECE_S * RATE)
    for at in range(0, len(data), size):
        yield data[at : at + size]
        await asyncio.sleep(PIECE_S / pace)


async def send(connection: AsyncRealtimeConnection, pieces: AsyncIterator[bytes]) -> None:
    async for piece in pieces:
        await connection.input_audio_buffer.append(audio=base64.b64encode(piece).decode())


async def show(connection: AsyncRealtimeConnection, sent: asyncio.Task) -> None:
    """Prints text as it comes, a line for each turn, until all was sent and answered."""
    pending: set[str] = set()
    while pending or not sent.done():
        try:
            event = await asyncio.wait_for(connection.recv(), PATIENCE_S if sent.done() else 1)
        except TimeoutError:
            if sent.done():
                return
            continue
        if event.type == "input_audio_buffer.speech_started":
            pending.add(event.item_id)
        elif event.type == "conversation.item.input_audio_transcription.delta":
            print(event.delta, end="", flush=True)
        elif event.type.endswith((".completed", ".failed")):
            pending.discard(event.item_id)
            print(f" [{event.error.message}]" if event.type.endswith(".failed") else "", flush=True)
        elif event.type == "error":
            print(f"live_captions: {event.error.message}", file=sys.stderr)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="a recording; without it, the microphone")
    parser.add_argument("--base-url", default="http://localhost:8300/v1")
    parser.add_argument("--api-key", default="EMPTY")
    parser.add_argument("--pace", type=float, default=1.0, help="of a recording, times real time")
    args = parser.parse_args()
    client = AsyncOpenAI(base_url=args.base_url, api_key=args.api_key)
    async with client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
        sent = asyncio.create_task(send(connection, recording(args.file, args.pace) if args.file else microphone()))
        try:
            await show(connection, sent)
        finally:
            sent.cancel()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        pass
