"""What a system is made of goes in (corpora, backbones, systems); its license, and what it has heard, come out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sailer.data.corpora import about_corpus

logger = logging.getLogger(__name__)

# The Hub's identifiers (https://huggingface.co/docs/hub/repositories-licenses), from what binds least to what binds
# most. Of what a system is made of the last one counts. It is a reading of their main terms, and no legal advice.
LICENSES = (
    *("cc0-1.0", "pddl", "unlicense", "wtfpl"),
    *("mit", "isc", "zlib", "ncsa", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "postgresql"),
    *("bsl-1.0", "ms-pl", "afl-3.0", "artistic-2.0", "ecl-2.0", "apache-2.0", "cdla-permissive-1.0"),
    *("cdla-permissive-2.0", "odc-by", "etalab-2.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0"),
    *("mpl-2.0", "epl-1.0", "epl-2.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "eupl-1.1", "eupl-1.2", "osl-3.0", "gfdl"),
    *("gpl", "gpl-2.0", "gpl-3.0", "agpl-3.0", "cdla-sharing-1.0", "odbl", "cc-by-sa-3.0", "cc-by-sa-4.0"),
    *("openrail", "openrail++", "bigscience-openrail-m", "bigcode-openrail-m", "creativeml-openrail-m"),
    *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
    *("cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "other"),
)
UNKNOWN = "unknown"
_WEB = "that is not published: whether recordings of a public corpus are in it is not known"
_EMO_262 = ("msp_podcast", "iemocap", "meld", "mead", "cmu_mosei")
_EMOBOX = (*_EMO_262, "ravdess", "crema_d", "emo_db", "esd", "savee", "tess")


@dataclass(frozen=True)
class Origin:
    """Something that a system is made of.

    Args:
        kind: "corpus", "speech encoder", "text encoder" or "system".
        name: what the card calls it.
        license: one of `LICENSES`; "" where it is not known.
        link: where it is to be had; "" where that is not known.
        license_name: of terms of its own ("other").
        heard: what it was itself trained on, as the end of a sentence; "" where that is not known.
        corpora: those of `heard`, by the names of `load_corpus` where it knows them.
        hub_id: its name on the Hub; "" for something else.
    """

    kind: str
    name: str
    license: str = ""
    link: str = ""
    license_name: str = ""
    heard: str = ""
    corpora: tuple[str, ...] = ()
    hub_id: str = ""

    @property
    def terms(self) -> str:
        """Its license in words."""
        return (self.license_name if self.license == "other" else self.license) or "not known"


@dataclass(frozen=True)
class _Backbone:
    """Published backbones whose Hub ids match a pattern."""

    pattern: str
    license: str
    heard: str
    model_type: str
    corpora: tuple[str, ...] = ()
    license_name: str = ""
    license_link: str = ""


# The first pattern that matches counts. Licenses and training data were compared with the cards on the Hub in November
# 2026 (the header's `license`, and what the text says it was trained on), except that:
# - WavLM's cards have no license in the header; their text points to github.com/microsoft/UniSpeech/blob/main/LICENSE,
#   which is CC BY-SA 3.0. torchaudio, whose copies come from microsoft/unilm, says MIT; the stricter one stands here;
# - wav2vec2-large-lv60's card names LibriSpeech; that it is Libri-Light is the paper's (torchaudio says so too);
# - emotion2vec's cards call their license "model-license" and link to FunASR, whose MODEL_LICENSE it is. What
#   emotion2vec_base heard is the paper's (https://arxiv.org/abs/2312.15185), of EmoBox's corpora its own list;
# - of wav2vec2-xls-r-*, bert-*, hubert-base-ls960, whisper-base and whisper-large-v2 the cards were not at hand, nor
#   was the license of hubert-*-ls960-ft: papers, their sister models' cards and memory.
_WHISPER_V3 = f"5 million hours of speech from the web {_WEB}"
BACKBONES = (
    _Backbone("openai/whisper-large-v3-turbo", "mit", _WHISPER_V3, "whisper"),
    _Backbone("openai/whisper-large-v3", "apache-2.0", _WHISPER_V3, "whisper"),
    _Backbone("openai/whisper-*", "apache-2.0", f"680,000 hours of speech from the web {_WEB}", "whisper"),
    _Backbone("microsoft/wavlm-base", "cc-by-sa-3.0", "LibriSpeech", "wavlm"),
    *(
        _Backbone(f"microsoft/wavlm-{name}", "cc-by-sa-3.0", "Libri-Light, GigaSpeech and VoxPopuli", "wavlm")
        for name in ("base-plus", "large")
    ),
    _Backbone("facebook/hubert-base-ls960", "apache-2.0", "LibriSpeech", "hubert"),
    _Backbone(
        "facebook/hubert-*-ls960-ft", "apache-2.0", "Libri-Light, and LibriSpeech with its transcripts", "hubert"
    ),
    _Backbone("facebook/hubert-*", "apache-2.0", "Libri-Light", "hubert"),
    _Backbone("facebook/wav2vec2-*-voxpopuli*", "cc-by-nc-4.0", "VoxPopuli", "wav2vec2"),
    _Backbone("facebook/wav2vec2-base*", "apache-2.0", "LibriSpeech", "wav2vec2"),
    _Backbone("facebook/wav2vec2-large-lv60", "apache-2.0", "Libri-Light", "wav2vec2"),
    _Backbone(
        "facebook/wav2vec2-large-robust",
        "apache-2.0",
        "Libri-Light, Common Voice, Switchboard and Fisher",
        "wav2vec2",
    ),
    _Backbone(
        "facebook/wav2vec2-xls-r-*",
        "apache-2.0",
        "VoxPopuli, Multilingual LibriSpeech, Common Voice, VoxLingua107 and BABEL",
        "wav2vec2",
    ),
    _Backbone("facebook/w2v-bert-2.0", "mit", f"4.5 million hours of speech {_WEB}", "wav2vec2-bert"),
    _Backbone("FacebookAI/roberta-*", "mit", "text alone", "roberta"),
    _Backbone("roberta-*", "mit", "text alone", "roberta"),
    _Backbone("google-bert/bert-*", "apache-2.0", "text alone", "bert"),
    _Backbone("microsoft/deberta-v3-*", "mit", "text alone", "deberta-v2"),
    *(
        _Backbone(
            f"*/emotion2vec{name}*",
            "other",
            heard,
            "emotion2vec",
            corpora,
            "funasr-model-license",
            "https://github.com/modelscope/FunASR/blob/main/MODEL_LICENSE",
        )
        for name, heard, corpora in (
            ("_plus", "the corpora of EmoBox, with their labels, and speech that is not published", _EMOBOX),
            ("", "IEMOCAP, MSP-Podcast, MELD, MEAD and CMU-MOSEI at the least", _EMO_262),
        )
    ),
)


def of_corpus(name: str, license_: str | None = None) -> Origin:
    """A training corpus; `license_` is what its user says of it, where nothing is known."""
    about = about_corpus(name)
    if about is None:
        return Origin("corpus", name, license_ or "")
    return Origin("corpus", about.title, license_ or about.license, about.link, about.license_name)


def of_backbone(kind: str, source: str, hub_id: str | None = None, model_type: str | None = None) -> Origin:
    """A backbone.

    Args:
        kind: "speech encoder" or "text encoder".
        source: Hub id or folder, or one of the tiny backbones that are made here.
        hub_id: what a folder is a copy of. Without it the folder's own card tells.
        model_type: of the backbone's configuration; a `hub_id` of another architecture is not believed.
    """
    if source.startswith("tiny-"):
        return Origin(kind, source, "apache-2.0", heard="nothing: its weights are random")
    is_folder = Path(source).exists()
    named = (hub_id or "") if is_folder else source
    known = _published(named)
    if known is not None and is_folder and model_type not in (None, known.model_type):
        logger.warning("%s is no %s: it is a model of type %s.", source, named, model_type)
        known = None
    if known is None:
        return _of_card(kind, source, read_card(source))
    link = known.license_link or f"https://huggingface.co/{named}"
    return Origin(kind, named, known.license, link, known.license_name, known.heard, known.corpora, named)


def of_system(source: str | Path, kind: str = "system") -> Origin:
    """A system of which another is made, by its own card: a folder or Hub id."""
    return _of_card(kind, str(source), read_card(source))


def most_restrictive(origins: Iterable[Origin]) -> dict[str, str]:
    """The fields of a card's header that say under which license a system is: that which binds most.

    Something of an unknown license makes it "other", named "unknown"; a warning says of what it is not known.
    """
    found = list(origins)
    unknown = [origin for origin in found if not origin.license]
    for origin in unknown:
        logger.warning("The license of the %s %s is not known: the card says other.", origin.kind, origin.name)
    if unknown or not found:
        return {"license": "other", "license_name": UNKNOWN}
    last = max(found, key=lambda origin: LICENSES.index(origin.license))
    if last.license != "other":
        return {"license": last.license}
    return {"license": "other", "license_name": last.license_name or UNKNOWN} | (
        {"license_link": last.link} if last.link else {}
    )


def read_card(source: str | Path) -> dict[str, Any] | None:
    """The header of a system's or backbone's own card: of a folder, or on the Hub where that is to be reached."""
    from huggingface_hub import ModelCard

    path = file_of(source, "README.md")
    if path is None:
        return None
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # YAML of others, which any parser's error may come of
        logger.warning("%s has a header that cannot be read: %s", path, error)
        return None


def file_of(source: str | Path, name: str) -> Path | None:
    """A file of a folder or of a Hub id ("user/name@revision"); None where it is not, or the Hub cannot be reached."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    path = Path(source) / name
    if not Path(source).exists():
        repository, _, revision = str(source).partition("@")
        try:
            path = Path(hf_hub_download(repository, name, revision=revision or None))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError):
            return None
    return path if path.is_file() else None


def hub_ids(origins: Sequence[Origin]) -> list[str]:
    """Those that are on the Hub, for `base_model`."""
    return [origin.hub_id for origin in origins if origin.hub_id]


def _published(hub_id: str) -> _Backbone | None:
    return next((backbone for backbone in BACKBONES if fnmatch(hub_id, backbone.pattern)), None)


def _of_card(kind: str, source: str, card: dict[str, Any] | None) -> Origin:
    card = card or {}
    stated = str(card.get("license") or "").lower()
    own = str(card.get("license_name") or "") if stated == "other" else stated
    # One that is not in the list has terms of its own; what is called unknown there is unknown here.
    license_ = "" if own in ("", "other", UNKNOWN) else stated if stated in LICENSES else "other"
    is_folder = Path(source).exists()
    hub_id = "" if is_folder else source.partition("@")[0]
    link = str(card.get("license_link") or (hub_id and f"https://huggingface.co/{hub_id}"))
    base = card.get("base_model") or ""
    known = _published(str(base[0] if isinstance(base, list) else base))
    heard, corpora = (known.heard, known.corpora) if known else ("", ())
    name = Path(source).resolve().name if is_folder else source
    return Origin(kind, name, license_, link, own, heard, corpora, hub_id)
