"""The reference model in Hugging Face transformers, on a GPU or the CPU, without vLLM.

    python hf_demo.py [--model FOLDER] [files…]

Transcribes and describes recordings (default: wavs/), first one by one, then all in one batch. Both must
agree; the exit status is 1 if they do not.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoProcessor

ROOT = Path(__file__).resolve().parent
INSTRUCTIONS = ("Please transcribe this audio.", "Please describe this audio.")


def default_model() -> Path:
    """model/ if the full weights are in it, else the bundled checkpoint."""
    full = ROOT / "model"
    return full if any(full.glob("*.safetensors")) else ROOT / "checkpoint"


@torch.inference_mode()
def answer(model, processor, recordings: list, instruction: str, max_new_tokens: int) -> list[str]:
    """Greedy answers about recordings (see `load_audio` for what one can be), computed in one batch."""
    conversations = [
        [{"role": "user", "content": [{"type": "audio", "audio": recording}, {"type": "text", "text": instruction}]}]
        for recording in recordings
    ]
    inputs = processor.apply_chat_template(conversations).to(model.device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="recordings (default: wavs/*.wav)")
    parser.add_argument("--model", type=Path, default=default_model())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="default: the checkpoint's on a GPU, float32 on the CPU, where it is faster")
    parser.add_argument("--max-new-tokens", type=int, default=500)
    args = parser.parse_args()

    dtype = args.dtype or ("float32" if args.device == "cpu" else "auto")
    print(f"{args.model} on {args.device}, {dtype}")
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True, dtype=dtype).to(args.device)
    files = args.files or [str(path) for path in sorted((ROOT / "wavs").glob("*.wav"))]
    differ = 0
    for instruction in INSTRUCTIONS:
        print(f"\n{instruction}")
        batched = answer(model, processor, files, instruction, args.max_new_tokens)
        for path, together in zip(files, batched, strict=True):
            (alone,) = answer(model, processor, [path], instruction, args.max_new_tokens)
            print(f"  {path}\n    {alone}")
            if alone != together:
                print(f"    in the batch: {together}")
                differ += 1
    print(f"\n{differ} answers differ between one by one and batched")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
