"""server/glm_asr.py and server/glmasr_audio.py in vLLM's offline engine, float32, against the reference of each layout.

Every engine runs in a process of its own: `python tests/test_encoder.py JOB_FOLDER` does what `run_engine` wrote there.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_reference import clip, inputs_of, logits_of, native_config, randomize, small_checkpoint, small_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GlmAsrForConditionalGeneration, GlmAsrProcessor, WhisperFeatureExtractor

SECONDS = (1, 7, 29.99, 30)
WHOLE_TOKENS_S = (1.04, 7.04)  # lengths at which layout B's reference also takes what is not padded
NEW_TOKENS = 16
MAX_LOGIT_DIFFERENCE = 1e-3
MAX_PACKING_DIFFERENCE = 1e-4
ENGINE_S = 240  # an engine that has not answered by then has failed
PROMPT_A = "<|user|>\n<|begin_of_audio|><|audio|><|end_of_audio|>\nPlease transcribe this audio.<|assistant|>\n"
PROMPT_B = (
    "<|user|>\n<|begin_of_audio|><|pad|><|end_of_audio|><|user|>\nPlease transcribe this audio into text<|assistant|>\n"
)
UNIPROC = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


# --- in the engine's process --------------------------------------------------------------------------


def answer(job: Path) -> None:
    """Runs one engine over the job's clips, in one batch and then one by one, and leaves what it gave in the folder."""
    from vllm import LLM, SamplingParams

    wanted = json.loads((job / "job.json").read_text())
    clips = list(np.load(job / "clips.npz").values())
    memory = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30}  # engines share one GPU
    engine = LLM(dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=8, **memory, **wanted["options"])
    requests = [{"prompt": wanted["prompt"], "multi_modal_data": {"audio": [clip]}} for clip in clips]
    greedy = {"temperature": 0.0, "max_tokens": NEW_TOKENS, "ignore_eos": True, "detokenize": False}
    answers = {}

    if wanted["compare"]:
        engine.apply_model(count_clips)
    for i, output in enumerate(engine.generate(requests, SamplingParams(**greedy), use_tqdm=False)):
        answers[f"prompt_{i}"] = np.array(output.prompt_token_ids)
        answers[f"together_{i}"] = np.array(output.outputs[0].token_ids)
    if wanted["compare"]:
        answers["most_clips"] = np.array(max(COUNTED))
        answers["packing"] = np.array(engine.apply_model(Packing(clips))[0])
        engine.apply_model(record_logits)
        for i, request in enumerate(requests):
            engine.reset_prefix_cache()
            engine.llm_engine.engine_core.reset_encoder_cache()
            RECORDED.clear()
            output = engine.generate([request], SamplingParams(**greedy, prompt_logprobs=0), use_tqdm=False)[0]
            answers[f"alone_{i}"] = np.array(output.outputs[0].token_ids)
            prompt = [logits for logits in RECORDED if len(logits) == len(output.prompt_token_ids) - 1]
            answers[f"logits_{i}"] = torch.cat(prompt + [logits for logits in RECORDED if len(logits) == 1]).numpy()
    np.savez(job / "answers.npz", **answers)


COUNTED: list[int] = []  # clips of each pass through the encoder
RECORDED: list[Tensor] = []  # (positions, vocabulary), as they were computed


def record_logits(model: nn.Module) -> None:
    """Has the model keep a copy of all logits in RECORDED."""
    compute = model.compute_logits

    def recording(hidden_states: Tensor) -> Tensor:
        logits = compute(hidden_states)
        RECORDED.append(logits.float().cpu().clone())
        return logits

    model.compute_logits = recording


def count_clips(model: nn.Module) -> None:
    """Has the model note in COUNTED how many clips it encodes at once."""
    embed = model.embed_multimodal

    def counting(**inputs) -> list[Tensor]:
        COUNTED.append(len(inputs["waveform"]))
        return embed(**inputs)

    model.embed_multimodal = counting


@dataclass
class Packing:
    """Asks a model for the largest difference between embeddings of clips in one pass and one by one."""

    clips: list[np.ndarray]

    def __call__(self, model: nn.Module) -> float:
        together = self._embed(model, self.clips)
        alone = [self._embed(model, [clip])[0] for clip in self.clips]
        assert [embedded.shape for embedded in together] == [embedded.shape for embedded in alone]
        return float((torch.cat(together) - torch.cat(alone)).abs().max())  # NaN if any is

    @staticmethod
    @torch.no_grad()
    def _embed(model: nn.Module, clips: list[np.ndarray]) -> list[Tensor]:
        waveforms = [torch.from_numpy(clip) for clip in clips]
        return list(model.embed_multimodal(waveform=waveforms, window_starts=[torch.tensor([0])] * len(clips)))


def inspect(job: Path) -> None:
    """Leaves in the folder what vLLM's configuration and registry say of the checkpoints."""
    from vllm.config import ModelConfig
    from vllm.model_executor.models.interfaces import supports_lora
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.config import get_config

    wanted = json.loads((job / "job.json").read_text())
    found = {"config": {}, "registry": {}}
    for layout, folder in wanted["folders"].items():
        for trust in (False, True):
            config = get_config(folder, trust_remote_code=trust)
            found["config"][f"{layout} {trust}"] = [type(config).__name__, type(config.get_text_config()).__name__]
        if layout == "model":  # has no tokenizer before the weights are downloaded
            continue
        model_config = ModelConfig(model=folder, dtype="float32")
        info, architecture = ModelRegistry.inspect_model_cls(model_config.architectures, model_config)
        model_class, _ = ModelRegistry.resolve_model_cls(model_config.architectures, model_config)
        found["registry"][layout] = {
            "architecture": architecture,
            "module": model_class.__module__,
            "tensor parallel heads": model_config.model_arch_config.total_num_attention_heads,
            "lora": bool(supports_lora(model_class)),
            **{name: getattr(info, name) for name in ("supports_pp", "supports_multimodal", "supports_transcription")},
        }
    mapper = model_class.hf_to_vllm_mapper
    found["names"] = {spelling: [mapper.map_name(name) for name in names] for spelling, names in wanted["names"].items()}
    (job / "found.json").write_text(json.dumps(found))


# --- the engines and what they gave -------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """For each clip: the prompt's ids, the greedy ids in a batch and alone, and the logits of all positions but the last.

    packing is how far embeddings in one pass and alone differ, most_clips how many the batch encoded at once.
    """

    seconds: tuple[float, ...]
    prompts: list[np.ndarray]
    together: list[list[int]]
    alone: list[list[int]]
    logits: list[Tensor]
    packing: float
    most_clips: int


def run(job: Path, wanted: dict) -> None:
    """Has another process do a job; an engine with one worker runs wholly in that process."""
    (job / "job.json").write_text(json.dumps(wanted))
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # engines run beside one another
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(Path(__file__).resolve()), str(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=ENGINE_S)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


def run_engine(
    job: Path, folder: Path, prompt: str, seconds: tuple[float, ...] = SECONDS, compare: bool = True, **options
) -> Answers:
    """Answers of an engine with these options on a checkpoint."""
    job.mkdir()
    np.savez(job / "clips.npz", *[clip(length, seed) for seed, length in enumerate(seconds)])
    options = {"model": str(folder), "distributed_executor_backend": UNIPROC} | options
    run(job, {"task": "answer", "prompt": prompt, "compare": compare, "options": options})
    found = dict(np.load(job / "answers.npz"))

    def of_each(name: str) -> list[np.ndarray]:
        return [found[f"{name}_{i}"] for i in range(len(seconds)) if f"{name}_{i}" in found]

    return Answers(
        seconds=seconds,
        prompts=of_each("prompt"),
        together=[ids.tolist() for ids in of_each("together")],
        alone=[ids.tolist() for ids in of_each("alone")],
        logits=[torch.from_numpy(logits) for logits in of_each("logits")],
        packing=float(found.get("packing", np.nan)),
        most_clips=int(found.get("most_clips", 0)),
    )


def layout_a(folder: Path) -> Path:
    """A small random checkpoint of layout A, with the weights that such files hold unused."""
    model = small_model(small_checkpoint(folder))
    model.save_pretrained(folder)
    unused = {
        "audio_encoder.proj.weight": torch.ones(3, 3),
        "audio_encoder.audio_bos_eos_token.weight": torch.ones(2, 128),
        "audio_encoder.whisper.embed_positions.weight": torch.ones(1500, 128),
    }
    save_file(load_file(folder / "model.safetensors") | unused, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def layout_b(folder: Path) -> Path:
    """A small random checkpoint of layout B as save_pretrained writes it, its placeholder the token <|pad|>."""
    small_checkpoint(folder)
    config = native_config(AutoConfig.from_pretrained(folder, trust_remote_code=True), dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder, pad_token="<|endoftext|>")
    config.audio_token_id = tokenizer.convert_tokens_to_ids("<|pad|>")
    shutil.rmtree(folder)
    model = GlmAsrForConditionalGeneration(config)
    randomize(model, 1)
    model.float().save_pretrained(folder)
    template = (ROOT / "model" / "chat_template.jinja").read_text().replace("<|audio|>", "<|pad|>")
    GlmAsrProcessor(WhisperFeatureExtractor(feature_size=128), tokenizer, chat_template=template).save_pretrained(folder)
    # processor_config.json holds the extractor's settings too; older files have them in preprocessor_config.json.
    WhisperFeatureExtractor(feature_size=128).save_pretrained(folder)
    return folder


def spellings_of_b(folder: Path) -> dict[str, list[str]]:
    """Layout B's weight names: of transformers' modules, of its save_pretrained, and as published."""
    model = GlmAsrForConditionalGeneration.from_pretrained(folder, dtype="float32")
    modules = list(model.state_dict())
    return {
        "modules": modules,
        "saved": list(load_file(folder / "model.safetensors")),
        "published": [published_name(name) for name in modules],
    }


def published_name(name: str) -> str:
    """A native module's name as zai-org/GLM-ASR-Nano-2512 has it."""
    for ours, published in (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")):
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    return name.removeprefix("model.")


def as_published(folder: Path, copy: Path) -> Path:
    """A copy of a layout-B checkpoint with the published names."""
    shutil.copytree(folder, copy)
    weights = GlmAsrForConditionalGeneration.from_pretrained(folder, dtype="float32").state_dict()
    published = {published_name(name): weight.contiguous() for name, weight in weights.items()}
    save_file(published, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@dataclass(frozen=True)
class Jobs:
    """Checkpoints, and engines that run beside one another, two at a time."""

    a: Path
    b: Path
    engines: dict[str, Future]

    def __getitem__(self, name: str) -> Answers:
        return self.engines[name].result()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    root = tmp_path_factory.mktemp("engines")
    a, b = layout_a(root / "A"), layout_b(root / "B")
    published = as_published(b, root / "B published")
    unpadded = {"hf_overrides": {"pad_windows": False}}
    with ThreadPoolExecutor(2) as pool:

        def start(name: str, *args, **options) -> Future:
            return pool.submit(run_engine, root / f"job {name}", *args, **options)

        engines = {
            "A": start("A", a, PROMPT_A),
            "B": start("B", b, PROMPT_B),
            "B unpadded": start("B unpadded", published, PROMPT_B, WHOLE_TOKENS_S, **unpadded),
            "A on two ranks": start(
                "A on two ranks", a, PROMPT_A, compare=False, tensor_parallel_size=2, distributed_executor_backend="mp"
            ),
        }
        yield Jobs(a, b, engines)


# --- against the references ---------------------------------------------------------------------------


def reference_a(folder: Path) -> Callable[[np.ndarray, np.ndarray], tuple[Tensor, Tensor]]:
    """Layout A's reference: of a clip and answered ids, the prompt's ids and all logits (length, vocabulary)."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = small_model(folder)

    def logits(waveform: np.ndarray, answered: list[int]) -> tuple[Tensor, Tensor]:
        inputs = inputs_of(processor, waveform)
        prompt = inputs["input_ids"]
        inputs["input_ids"] = torch.cat([prompt, torch.tensor([answered])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return prompt[0], logits_of(model, inputs)[0]

    return logits


def reference_b(folder: Path, padded: bool = True) -> Callable[[np.ndarray, np.ndarray], tuple[Tensor, Tensor]]:
    """Layout B's, which is transformers' own; where not padded, its encoder gets the clip's own frames."""
    processor = GlmAsrProcessor.from_pretrained(folder)
    model = GlmAsrForConditionalGeneration.from_pretrained(folder, dtype="float32").eval()

    @torch.no_grad()
    def logits(waveform: np.ndarray, answered: list[int]) -> tuple[Tensor, Tensor]:
        inputs = processor(text=[PROMPT_B], audio=[waveform])
        prompt = inputs["input_ids"]
        ids = torch.cat([prompt, torch.tensor([answered])], dim=1)
        features, mask = inputs["input_features"], inputs["input_features_mask"]
        assert features.shape[2] == 3000
        if not padded:
            frames = int(mask.sum())
            features = processor.feature_extractor(
                waveform, sampling_rate=16000, padding=False, truncation=False, return_tensors="pt"
            ).input_features
            mask = mask[:, :frames]
        return prompt[0], model(input_ids=ids, input_features=features, input_features_mask=mask).logits[0]

    return logits


def assert_equals_reference(name: str, answers: Answers, reference: Callable) -> None:
    """Ids of the prompt and the greedy answer are the reference's, and so are the logits of every position."""
    for i, seconds in enumerate(answers.seconds):
        prompt, logits = reference(clip(seconds, i), answers.alone[i])
        assert answers.prompts[i].tolist() == prompt.tolist()
        expected = logits[:-1]
        assert answers.logits[i].shape == expected.shape
        difference = float((answers.logits[i] - expected).abs().max())
        print(f"{name}, {seconds} s: largest logit difference {difference:.1e}, over logits of spread {expected.std():.2f}")
        assert expected.std() > 0.5
        assert difference < MAX_LOGIT_DIFFERENCE
        assert expected[-NEW_TOKENS:].argmax(-1).tolist() == answers.alone[i]


def test_layout_a_gives_the_logits_and_ids_of_the_reference_model(jobs):
    assert_equals_reference("layout A", jobs["A"], reference_a(jobs.a))


def test_layout_b_gives_the_logits_and_ids_of_transformers_native_model(jobs):
    assert_equals_reference("layout B", jobs["B"], reference_b(jobs.b))


def test_layout_b_without_padding_gives_the_logits_of_the_native_model_without_padding(jobs):
    assert_equals_reference("layout B, not padded", jobs["B unpadded"], reference_b(jobs.b, padded=False))


def test_the_padding_of_layout_b_makes_a_difference(jobs):
    answers = jobs["B unpadded"]
    _, padded = reference_b(jobs.b)(clip(answers.seconds[0], 0), answers.alone[0])
    assert float((answers.logits[0] - padded[:-1]).abs().max()) > 100 * MAX_LOGIT_DIFFERENCE


@pytest.mark.parametrize("name", ["A", "B", "B unpadded"])
def test_clips_encoded_in_one_pass_give_what_each_gives_alone(jobs, name):
    answers = jobs[name]
    print(f"{name}: largest difference of embeddings, packed against alone: {answers.packing:.1e}")
    assert answers.packing < MAX_PACKING_DIFFERENCE
    assert answers.most_clips == len(answers.seconds)  # so the batch was one pass
    assert answers.together == answers.alone


def test_two_tensor_parallel_ranks_answer_as_one(jobs):
    assert jobs["A on two ranks"].together == jobs["A"].alone


# --- what vLLM knows of the model ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> dict:
    job = tmp_path_factory.mktemp("inspect")
    folders = {"A": str(jobs.a), "B": str(jobs.b), "model": str(ROOT / "model")}
    run(job, {"task": "inspect", "folders": folders, "names": spellings_of_b(jobs.b)})
    return json.loads((job / "found.json").read_text())


@pytest.mark.parametrize("trusted", [False, True], ids=["without trust", "with trust"])
@pytest.mark.parametrize(("layout", "name"), [("A", "GlmasrConfig"), ("B", "GlmAsrConfig"), ("model", "GlmasrConfig")])
def test_a_checkpoint_resolves_to_the_configuration_of_its_layout(found, layout, name, trusted):
    assert found["config"][f"{layout} {trusted}"] == [name, "LlamaConfig"]


@pytest.mark.parametrize("layout", ["A", "B"])
def test_vllms_registry_knows_what_the_model_can(found, layout):
    assert found["registry"][layout] == {
        "architecture": {"A": "GlmasrForConditionalGeneration", "B": "GlmAsrForConditionalGeneration"}[layout],
        "module": "vllm.model_executor.models.glm_asr",
        "tensor parallel heads": 4,
        "lora": True,
        "supports_pp": True,
        "supports_multimodal": True,
        "supports_transcription": True,
    }


def test_every_spelling_of_layout_bs_weight_names_means_the_same_weights(found):
    modules, saved, published = (sorted(found["names"][spelling]) for spelling in ("modules", "saved", "published"))
    assert modules == saved == published


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    {"answer": answer, "inspect": inspect}[json.loads((folder / "job.json").read_text())["task"]](folder)
