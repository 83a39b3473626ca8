"""The page at /, driven in headless Chromium against the real server: what users see and hear, and what they get."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pysubs2
import pytest
import soundfile
import webvtt
from browser import REFUSE, Page, Relay, browse
from clients import expected_text
from conftest import ROOT, Server, run_server
from test_readme import served_files

KEY = "a-secret"
PAGE = ROOT / "server" / "page"
LONG, ENGLISH, CHINESE = (ROOT / "wavs" / f"{stem}.wav" for stem in ("en_long", "en_cake", "zh_birthday"))
LIVE = ("Listening", "Hearing you")
MIN_CONTRAST = 4.5  # WCAG 2.2, AA


@pytest.fixture(scope="module")
def page(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """One browser for what needs no microphone, on the shared server."""
    with browse(tmp_path_factory.mktemp("page")) as opened:
        yield opened


@pytest.fixture(autouse=True)
def no_complaints(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test: no script has failed, and nothing wanted what the page's policy forbids."""
    yield
    if "page" in request.fixturenames:
        assert request.getfixturevalue("page").complaints() == []


def letters(text: str) -> str:
    return re.sub(r"\W", "", text.lower())


def notice(page: Page, part: str) -> str:
    """The message that is shown, once it says `part`."""
    page.wait(lambda: part in page.text("#notice"), f"a message with {part!r}")
    return page.text("#notice")


def transcribe(page: Page, server: Server, wav: Path) -> None:
    page.open(server.url)
    page.drop(wav)
    page.wait(lambda: page.text("#work-state").startswith("Done"), "the transcript")


# --- recordings -------------------------------------------------------------------------------------


def test_a_dropped_file_gives_a_transcript_and_downloads_that_parse(page: Page, server: Server):
    transcribe(page, server, LONG)
    assert letters("".join(page.texts("#segments li span"))) == letters(expected_text(LONG))
    text = page.download("#file-actions", "txt").decode()
    assert letters(text) == letters(expected_text(LONG))
    srt = page.download("#file-actions", "srt").decode()
    vtt = page.download("#file-actions", "vtt").decode()
    cues = pysubs2.SSAFile.from_string(srt, format_="srt")
    captions = webvtt.from_string(vtt)
    assert letters("".join(cue.plaintext for cue in cues)) == letters("".join(cue.text for cue in captions)) == letters(text)
    files = {"file": (LONG.name, LONG.read_bytes())}
    for name, downloaded in (("srt", srt), ("vtt", vtt)):
        answer = httpx.post(f"{server.url}/v1/audio/transcriptions", files=files, data={"response_format": name}, timeout=120)
        assert downloaded == answer.text
    whole = json.loads(page.download("#file-actions", "json"))
    assert whole["text"] + "\n" == text and whole["language"] == "english"
    assert [segment["text"] for segment in whole["segments"]] == page.texts("#segments li span")


def test_a_click_on_a_time_plays_from_there(page: Page, server: Server):
    transcribe(page, server, LONG)
    page.click("#segments li:nth-child(3) button")
    media = "document.querySelector('audio')"
    page.wait(lambda: not page.run(f"return {media}.paused"), "the player to play")
    start = page.run(f"return {media}.currentTime")
    minutes, seconds = page.texts("#segments li button")[2].split(":")
    assert 0 <= start - (60 * int(minutes) + int(seconds)) < 2
    assert page.find("#segments li:nth-child(3)").get_attribute("aria-current") == "true"


def test_progress_is_shown_while_a_file_is_sent_and_transcribed(page: Page, server: Server, tmp_path: Path):
    samples, rate = soundfile.read(LONG, dtype="int16")
    long = tmp_path / "long.wav"
    soundfile.write(long, np.tile(samples, 5), rate)
    page.open(server.url)
    page.run("""window.seen = [];
        const note = () => seen.push([document.getElementById("work-state").textContent, document.getElementById("progress").value,
                                      document.getElementById("progress").hidden]);
        new MutationObserver(note).observe(document.getElementById("work"), {subtree: true, childList: true, attributes: true})""")
    throttle = {"offline": False, "latency": 0, "downloadThroughput": -1}
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", throttle | {"uploadThroughput": 4e6})
    page.drop(long)
    page.wait(lambda: page.text("#work-state").startswith("Done"), "the transcript", 180)
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", throttle | {"uploadThroughput": -1})
    seen = page.run("return seen")
    sent = [value for text, value, _ in seen if text.startswith("Sending") and value]
    read = [value for text, value, _ in seen if text.startswith("Transcribed") and value]
    print(f"{len(sent)} steps of sending, {len(read)} of transcribing")
    for values in (sent, read):
        assert len(values) > 3 and values == sorted(values) and 0 < values[0] < 0.7 and values[-1] <= 1
    assert seen[-1][2], "the bar stays"


def test_a_recording_behind_an_address_is_transcribed(page: Page, server: Server):
    page.open(server.url)
    page.click("#tab-file")
    with served_files() as files_url:
        page.find("#url").send_keys(f"{files_url.replace('127.0.0.1', 'localhost')}/{CHINESE.name}\n")
        page.wait(lambda: page.text("#work-state").startswith("Done"), "the transcript")
    assert letters("".join(page.texts("#segments li span"))) == letters(expected_text(CHINESE))
    page.find("#url").clear()
    page.find("#url").send_keys("https://elsewhere.example.com/a.wav\n")
    assert "--allowed-media-domains" in notice(page, "The server cannot use this recording")


def test_a_description_is_given(page: Page, server: Server):
    page.open(server.url)
    page.click("#tab-file")
    page.find("#instruction option[value=describe]").click()
    page.find("#file").send_keys(str(ENGLISH))
    page.wait(lambda: page.text("#work-state").startswith("Done"), "the description")
    assert page.text("#answer").startswith("A ") and "speaks English" in page.text("#answer")
    assert page.download("#file-actions", "txt").decode().strip() == page.text("#answer")
    page.find("#instruction option[value=own]").click()
    page.find("#own").send_keys("Please transcribe this audio.")
    page.click("#again")
    page.wait(lambda: page.text("#answer") == expected_text(ENGLISH), "the answer to an instruction")


def test_what_is_not_audio_and_what_is_empty_is_said(page: Page, server: Server, tmp_path: Path):
    page.open(server.url)
    for name, content, message in (("text.wav", b"not audio" * 99, "may not be audio"), ("empty.wav", b"", "The file is empty")):
        (tmp_path / name).write_bytes(content)
        page.drop(tmp_path / name)
        notice(page, message)
    page.drop(CHINESE)
    page.wait(lambda: page.text("#work-state").startswith("Done"), "the transcript after them")
    assert page.text("#notice") == ""


# --- the server locked, full of files, and gone --------------------------------------------------------


def test_a_wrong_key_a_file_too_large_and_a_stopped_server_are_said(tmp_path: Path):
    large = tmp_path / "large.wav"
    soundfile.write(large, np.zeros(1_200_000, np.int16), 16000)
    limits = {"MAX_UPLOAD_MB": "2", "VLLM_MAX_AUDIO_CLIP_FILESIZE_MB": "1"}
    with browse(tmp_path) as page:
        with run_server(tmp_path / "server.log", API_KEY=KEY, **limits) as locked:
            page.open(locked.url)
            assert page.state() == "locked"
            notice(page, "asks for an API key")
            enter_key(page, "another")
            notice(page, "does not accept this API key")
            page.click("#microphone")
            page.wait(lambda: page.text("#live-state") == "Microphone is off", "the microphone to be off again")
            notice(page, "does not accept this API key")
            page.drop(CHINESE)
            notice(page, "does not accept this API key")
            enter_key(page, KEY)
            page.wait(lambda: page.state() == "ready" and not page.text("#notice"), "the key to be accepted")
            assert page.run("return [sessionStorage.length, Object.values(localStorage).includes(arguments[0])]", KEY) == [1, False]
            page.drop(CHINESE)
            page.wait(lambda: page.text("#work-state").startswith("Done"), "the transcript")
            page.drop(large)
            assert "it has 2.3 MB, and up to 2.0 MB are taken" in notice(page, "The file is too large")
            page.find("#instruction option[value=describe]").click()
            page.drop(large)
            notice(page, "up to 1.0 MB are taken")
            page.click("#tab-live")
            page.click("#microphone")
            page.wait(lambda: page.text("#live-state") in LIVE, "the session")
        notice(page, "The server does not answer")
        page.wait(lambda: page.state() == "away", "the server's state")
        assert page.text("#live-state").startswith("No connection. What you say is kept")
        page.find("#tab-file").click()
        page.find("#instruction option[value=transcribe]").click()
        page.drop(CHINESE)
        page.wait(lambda: page.find("#again").is_displayed(), "the end of the attempt")
        notice(page, "The server does not answer")


def enter_key(page: Page, key: str) -> None:
    page.find("#key-input").clear()
    page.find("#key-input").send_keys(f"{key}\n")


def test_a_key_that_browsers_cannot_send_live_is_said(page: Page, server: Server):
    page.open(server.url)
    page.click("#key-toggle")
    enter_key(page, "two words")
    page.click("#microphone")
    notice(page, "no spaces")
    page.wait(lambda: page.text("#live-state") == "Microphone is off", "the microphone to be off again")
    page.click("#key-toggle")
    enter_key(page, "")


def test_the_page_finds_a_server_again_by_itself(page: Page, server: Server):
    relay = Relay(int(server.url.rpartition(":")[2]))
    page.open(f"http://127.0.0.1:{relay.port}")
    relay.cut()
    notice(page, "The server does not answer")
    relay.restore()
    page.wait(lambda: page.state() == "ready" and not page.text("#notice"), "the page to find the server")
    relay.cut()
    page.driver.get("about:blank")
    page.complaints()  # of the connections that were refused


# --- for everyone -------------------------------------------------------------------------------------


def test_nothing_is_loaded_from_elsewhere_and_nothing_else_may_be(page: Page, server: Server):
    page.open(server.url)
    loaded = page.run("return performance.getEntries().filter(one => one.name.includes('://')).map(one => one.name)")
    assert len(loaded) > 10 and all(name.startswith(server.url) for name in loaded)
    answer = httpx.get(server.url)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';") and "unsafe" not in policy
    for name in ("main.js", "page.css", "icon.svg"):
        part = httpx.get(f"{server.url}/page/{name}")
        assert part.content == (PAGE / name).read_bytes() and part.headers["x-content-type-options"] == "nosniff"
        assert httpx.get(f"{server.url}/page/{name}", headers={"If-None-Match": part.headers["etag"]}).status_code == 304
    assert httpx.get(f"{server.url}/page/nothing.js").status_code == 404


def test_every_text_is_there_in_english_and_chinese(page: Page, server: Server, tmp_path: Path):
    source = (PAGE / "words.js").read_text(encoding="utf-8")
    english, chinese = (dict(re.findall(r'(\w+): "([^"]*)"', part)) for part in re.split("const CHINESE", source))
    values = [{key: set(re.findall(r"\{\d\}", text)) for key, text in language.items()} for language in (english, chinese)]
    assert values[0] == values[1] and all(re.search(r"[\u4e00-\u9fff]|^English$", text) for text in chinese.values())
    used = set(re.findall(r'data-t(?:-label|-hint)?="(\w+)"', (PAGE / "index.html").read_text()))
    scripts = "".join(path.read_text() for path in PAGE.glob("*.js") if path.name != "words.js")
    quoted = set(re.findall(r'"(\w+)"', scripts))
    assert used <= set(english)
    assert set(english) - used - quoted == set(), "texts that nothing shows"
    assert {key for key in quoted if key.startswith("error") and key not in ("error", "errorKey")} <= set(english)
    with browse(tmp_path, language="zh-CN") as other:
        other.open(server.url)
        assert other.text("#tab-live") == "实时字幕" and other.run("return document.documentElement.lang") == "zh-CN"
        other.click("#language-toggle")
        assert other.text("#tab-live") == "Live captions"
        other.open(server.url)
        assert other.text("#tab-live") == "Live captions", "the choice is kept"


def test_keyboard_and_screen_reader_reach_everything(page: Page, server: Server):
    transcribe(page, server, LONG)
    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"button", "tab", "textbox", "searchbox", "combobox", "list", "region", "tabpanel", "progressbar", "tablist"}
    named = [(node["role"]["value"], node.get("name", {}).get("value")) for node in tree if not node["ignored"]]
    controls = [(role, name) for role, name in named if role in roles]
    assert len(controls) > 12 and all(name for _, name in controls), controls
    page.open(server.url)
    reached = []
    for _ in range(9):
        tab = {"type": "keyDown", "key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9}
        page.driver.execute_cdp_cmd("Input.dispatchKeyEvent", tab)
        reached.append(page.run("return document.activeElement.id"))
    assert reached[:7] == ["key-toggle", "language-toggle", "tab-live", "speech-language", "context", "captions", "microphone"]


def test_it_fits_a_narrow_phone(page: Page, server: Server):
    transcribe(page, server, LONG)
    page.resize(320, 640, mobile=True)
    for tab in ("file", "live"):
        page.click(f"#tab-{tab}")
        assert page.run("return document.documentElement.scrollWidth") <= 320
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_text_stands_out_in_light_and_dark():
    schemes = re.findall(r":root \{(.*?)\}", (PAGE / "page.css").read_text(), re.DOTALL)
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w+);", scheme)) for scheme in schemes)
    pairs = [("ink", "paper"), ("ink", "card"), ("ink", "now"), ("dim", "paper"), ("dim", "card"), ("dim", "line"), ("key", "paper"),
             ("key", "card"), ("key", "soft"), ("key", "now"), ("on-key", "key"), ("bad", "bad-soft"), ("bad", "card")]  # fmt: skip
    for scheme in (light, light | dark):
        for text, ground in pairs:
            brighter, darker = sorted((luminance(scheme[text]), luminance(scheme[ground])), reverse=True)
            contrast = (brighter + 0.05) / (darker + 0.05)
            assert contrast >= MIN_CONTRAST, f"{text} {scheme[text]} on {ground} {scheme[ground]}: {contrast:.2f}"


# --- the microphone -----------------------------------------------------------------------------------


def test_a_refused_microphone_is_said(server: Server, tmp_path: Path):
    with browse(tmp_path, setting=REFUSE) as page:
        page.open(server.url)
        page.click("#microphone")
        notice(page, "The microphone was refused")
        assert page.text("#live-state") == "Microphone is off"


def listen(page: Page, server_url: str) -> None:
    """Opens the page and turns the microphone on; notes each grey text that is shown."""
    page.open(server_url)
    page.run("""window.grey = [];
        const note = () => grey.push([...document.querySelectorAll("#pending span")].map(span => span.textContent));
        new MutationObserver(note).observe(document.getElementById("pending"), {subtree: true, childList: true, characterData: true})""")
    page.click("#microphone")
    page.wait(lambda: page.text("#live-state") in LIVE, "the session")


def heard_s(page: Page) -> int:
    """What the page's clock says: seconds of sound that the microphone has given."""
    minutes, seconds = page.text("#clock").split(":")
    return 60 * int(minutes) + int(seconds)


def stop_listening(page: Page, length_s: float) -> list[str]:
    """The captions once the recording has been played and all is final."""
    page.wait(lambda: heard_s(page) > length_s + 1, "the recording's end")
    page.click("#microphone")
    page.wait(lambda: page.text("#live-state") == "Microphone is off", "the last words")
    assert page.texts("#pending p") == [] and page.text("#notice") == ""
    return page.texts("#firm span")


def test_captions_appear_while_the_microphone_plays_and_end_as_the_final_text(server: Server, tmp_path: Path):
    spoken = tmp_path / "spoken.wav"
    soundfile.write(spoken, np.concatenate([soundfile.read(wav, dtype="int16")[0] for wav in (CHINESE, ENGLISH)]), 16000)
    length_s = soundfile.info(spoken).duration
    with browse(tmp_path, microphone=spoken) as page:
        listen(page, server.url)
        page.wait(lambda: page.texts("#firm p"), "the first sentence")
        sentence_s = heard_s(page)
        captions = stop_listening(page, length_s)
        print(f"of {length_s:.1f} s: the first sentence was there after {sentence_s} s")
        assert sentence_s < length_s - 1
        events = page.frames()
        finals = [event["transcript"] for event in events if event["type"].endswith("input_audio_transcription.completed")]
        assert captions == [final.strip() for final in finals if final.strip()]
        assert letters("".join(captions)) == letters(expected_text(CHINESE) + expected_text(ENGLISH))
        grey = [text for texts in page.run("return grey") for text in texts if text]
        assert grey and all(any(caption.startswith(text[:-1]) for caption in captions) for text in grey)
        srt = pysubs2.SSAFile.from_string(page.download("#live-actions", "srt").decode(), format_="srt")
        assert [cue.plaintext for cue in srt] == captions and srt[-1].end / 1000 < length_s + 3
        whole = json.loads(page.download("#live-actions", "json"))
        assert letters(whole["text"]) == letters("".join(captions)) and len(whole["segments"]) == len(captions)
        assert page.complaints() == []


def test_captions_outlive_a_cut_connection_with_nothing_lost_or_doubled(server: Server, tmp_path: Path):
    relay = Relay(int(server.url.rpartition(":")[2]))
    length_s = soundfile.info(CHINESE).duration
    with browse(tmp_path, microphone=CHINESE) as page:
        listen(page, f"http://127.0.0.1:{relay.port}")
        page.wait(lambda: page.texts("#firm p") and page.texts("#pending p"), "speech after a sentence")
        relay.cut()
        notice(page, "The server does not answer")
        assert page.text("#live-state").startswith("No connection. What you say is kept")
        cut_s = heard_s(page)
        relay.restore()
        page.wait(lambda: page.text("#live-state") in LIVE and not page.text("#notice"), "the session again")
        print(f"cut at {cut_s} s, found again at {heard_s(page)} s of {length_s:.1f} s")
        captions = stop_listening(page, length_s)
    assert letters("".join(captions)) == letters(expected_text(CHINESE))
    relay.cut()


@pytest.mark.parametrize("rate", [48000, 44100, 16000])
def test_the_microphone_is_resampled_without_folding(page: Page, server: Server, rate: int):
    page.open(server.url)
    script = """const { Resampler } = await import(new URL("page/resample.js", document.baseURI));
        const [rate, hertz, count] = arguments, resampler = new Resampler(rate, 24000), out = [];
        for (let from = 0; from < count; from += 128) {
            const tone = Float32Array.from({length: 128}, (_, i) => 0.5 * Math.sin(2 * Math.PI * hertz * (from + i) / rate));
            out.push(...resampler.feed(tone));
        }
        return [...out, ...resampler.finish()]"""
    time_s = np.arange(24000) / 24000
    for hertz in (50, 440, 3000, 0.4 * min(rate, 24000)):
        out = np.array(page.run(script, rate, hertz, 2 * rate))
        assert abs(out.size - 48000) <= 128 * 24000 / rate + 1
        error = out[6000:30000] - 0.5 * np.sin(2 * np.pi * hertz * (time_s + 0.25))
        assert np.abs(error).max() < 5e-4, f"{hertz} Hz at {rate} Hz: off by {np.abs(error).max():.1e}"
    if rate > 24000:
        folded = np.array(page.run(script, rate, 13000, rate))[6000:18000]
        assert np.abs(folded).max() < 5e-5
