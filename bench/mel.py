"""How long does the log-mel spectrogram take? On the device, packed, against WhisperFeatureExtractor in the API process."""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import WhisperFeatureExtractor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "server"), str(ROOT / "model")]
from glmasr_mel import LogMelSpectrogram  # noqa: E402
from glmasr_packing import Packer  # noqa: E402
from servers import hardware  # noqa: E402
from waveform_glmasr import AudioGeometry  # noqa: E402

SECONDS, CLIPS, REPEATS = (7.0, 30.0), (1, 16, 64), 10


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extractor = WhisperFeatureExtractor(feature_size=128)
    mel = LogMelSpectrogram(torch.tensor(extractor.mel_filters), extractor.n_fft, extractor.hop_length).to(device)
    geometry = AudioGeometry(extractor.sampling_rate, extractor.hop_length, extractor.chunk_length, merge_factor=4)
    packer, rng = Packer(geometry, extractor.n_fft), np.random.default_rng(0)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    print(f"{hardware()}, {time.strftime('%Y-%m-%d')}, milliseconds a clip\n")
    print("| clips | packed on the host and sent | spectrogram | WhisperFeatureExtractor, padded to 30 s |\n|---|---|---|---|")
    for seconds in SECONDS:
        for count in CLIPS:
            clips = [rng.standard_normal(int(16000 * seconds), np.float32) for _ in range(count)]
            tokens = [geometry.num_window_tokens(clip.size) for clip in clips]
            took = np.zeros(2)
            for repeat in range(REPEATS + 2):
                times = [time.perf_counter()]
                packed = packer.pack(clips, tokens, device)
                synchronize()
                times.append(time.perf_counter())
                mel(packed.samples, packed.window, count)
                synchronize()
                times.append(time.perf_counter())
                took += np.diff(times) * (repeat >= 2)  # the first two warm up
            began = time.perf_counter()
            extractor(clips[0], sampling_rate=extractor.sampling_rate)
            alone = time.perf_counter() - began
            packing, spectrogram = 1000 * took / REPEATS / count
            print(f"| {count} of {seconds:.0f} s | {packing:.3f} | {spectrogram:.3f} | {1000 * alone:.1f} |", flush=True)


if __name__ == "__main__":
    main()
