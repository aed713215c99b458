"""Words that names of LLMs are made of: families, makers, variants, quantisations, dates, providers.

Also cuts a name into words, without its path, provider and quantisation. `mope.target_llm` says what the words mean.
A new LLM of a known family needs no entry here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

MAX_NAME_CHARS = 200  # of a name that are read
MAX_PATH_CHARS = 2000  # of a path that are read, from its end
MAX_WORDS = 24  # of a name that are read


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# First word of a name -> its family. Most families have one word. The other words come right after it.
_FAMILIES: Mapping[str, str] = {
    "llama": "codellama", "qwen": "qwq qvq codeqwen tongyi", 
    "mistral": "ministral magistral codestral devstral pixtral voxtral mathstral",
    "mixtral": "", "gpt": "chatgpt davinci", "claude": "", "gemini": "learnlm",
    "gemma": "codegemma paligemma medgemma shieldgemma", "deepseek": "r1", "phi": "", "command": "", "aya": "",
    "grok": "", "kimi": "moonlight", "glm": "chatglm codegeex", "yi": "", "falcon": "falconmamba", "olmo": "olmoe",
    "granite": "", "jamba": "", "nemotron": "", "minimax": "", "ernie": "erniebot", "hunyuan": "", "internlm": "",
    "baichuan": "", "stablelm": "", "starcoder": "", "dbrx": "", "arctic": "", "solar": "", "exaone": "",
    "bloom": "bloomz", "opt": "", "mpt": "", "dolly": "", "vicuna": "", "alpaca": "", "koala": "", "guanaco": "",
    "zephyr": "", "tulu": "", "wizardlm": "", "openchat": "", "starling": "", "oasst": "", "pythia": "", "reka": "",
    "nova": "", "titan": "", "palm": "bison", "lfm": "", "smollm": "", "minicpm": "", "xverse": "", "seed": "",
    "doubao": "", "step": "", "ling": "", "ring": "", "mimo": "", "longcat": "", "gigachat": "", "yandexgpt": "",
    "nanbeige": "", "sarashina": "", "calm": "", "llm-jp": "", "t-lite": "", "t-pro": "", "rakutenai": "",
    "athene": "", "cogito": "",
    "intellect": "", "sonar": "", "palmyra": "", "inflection": "", "apertus": "", "eurollm": "", "salamandra": "",
    "plamo": "", "stockmark": "", "karakuri": "", "dots": "", "openelm": "", "rwkv": "", "mamba": "", "fuyu": "",
    "mercury": "", "skywork": "", "internvl": "", "redpajama": "", "gptj": "", "ultralm": "", "tinyllama": "",
}  # fmt: skip
FAMILIES: Mapping[str, str] = {
    word: family for family, others in _FAMILIES.items() for word in (family, *others.split())
}
FAMILY_NAMES = frozenset(_FAMILIES)
KNOWN_FAMILIES = FAMILY_NAMES | {"o"}  # with OpenAI's o1, o3 and o4, whose family is part of the version's word
FAMILY_PAIRS = frozenset({("llm", "jp"), ("t", "lite"), ("t", "pro")})  # families of two words

# Families that others tune. A name that starts with other words and has one of these is a tuned LLM of that family.
BASES = _set(
    "llama qwen mistral mixtral gpt gemma deepseek phi yi falcon olmo granite glm internlm baichuan stablelm starcoder "
    "pythia exaone command nemotron aya opt gptj vicuna tulu zephyr alpaca wizardlm oasst dolly solar bloom"
)
# A later family in these names is a data set or a judge, not what was tuned.
NEVER_TUNED_FROM_OTHERS = frozenset({"llama", "mistral", "qwen", "gemma", "gpt", "yi", "o"})
# Families whose version may stand behind other words.
VERSION_LATE = frozenset({"oasst"})
O_SERIES = re.compile(r"o[1-9]")
VERSIONED_FAMILY = re.compile(r"o([1-9])|(r1)")
# Families whose number stands right behind the family, although some write it behind the class.
VERSION_FIRST = frozenset({"claude", "gemini", "jamba"})
# Families that write `v` as part of the version.
KEEPS_V = frozenset({"deepseek"})
# Families whose names may end with how hard the LLM thinks. `medium` of any other family is a size.
WITH_EFFORT = frozenset({"o", "gpt", "claude", "gemini", "grok"})

_MAKERS: Mapping[str, str] = {
    "meta": "llama codellama", "qwen": "qwen qwq qvq codeqwen tongyi", "google": "gemini gemma bard palm bison learnlm "
    "codegemma paligemma medgemma shieldgemma", "mistralai": "mistral mixtral ministral magistral codestral devstral "
    "pixtral voxtral mathstral", "openai": "gpt chatgpt davinci o", "anthropic": "claude",
    "deepseek": "deepseek r1", "microsoft": "phi wizardlm mai", "cohere": "command aya", "xai": "grok",
    "moonshotai": "kimi moonlight", "zai": "glm chatglm codegeex", "01-ai": "yi", "tii": "falcon falconmamba",
    "allenai": "olmo olmoe tulu", "ibm": "granite", "ai21": "jamba", "nvidia": "nemotron", "minimax": "minimax",
    "baidu": "ernie erniebot", "tencent": "hunyuan", "internlm": "internlm internvl", "baichuan": "baichuan",
    "stabilityai": "stablelm", "bigcode": "starcoder", "databricks": "dbrx dolly", "snowflake": "arctic",
    "upstage": "solar", "lg": "exaone", "bigscience": "bloom bloomz", "mosaicml": "mpt", "lmsys": "vicuna",
    "stanford": "alpaca", "berkeley": "koala starling", "huggingface": "zephyr smollm", "openchat": "openchat",
    "openassistant": "oasst open-assistant", "eleutherai": "pythia gptj", "reka": "reka", "amazon": "nova titan",
    "liquidai": "lfm", "openbmb": "minicpm ultralm", "xverse": "xverse", "bytedance": "seed doubao", "stepfun": "step",
    "inclusionai": "ling ring", "xiaomi": "mimo", "meituan": "longcat", "sber": "gigachat", "yandex": "yandexgpt",
    "nanbeige": "nanbeige", "sbintuitions": "sarashina", "cyberagent": "calm", "llm-jp": "llm-jp",
    "rakuten": "rakutenai", "nexusflow": "athene", "deepcogito": "cogito", "primeintellect": "intellect",
    "perplexity": "sonar", "writer": "palmyra", "inflection": "inflection", "swiss-ai": "apertus", "pfn": "plamo",
    "stockmark": "stockmark", "karakuri": "karakuri", "rednote": "dots", "inception": "mercury",
    "nousresearch": "hermes openhermes deephermes", "cognitivecomputations": "dolphin", "tokyotech": "swallow",
    "elyza": "elyza", "openbuddy": "openbuddy", "axcxept": "ezo", "sambanova": "samba", "ilyagusev": "saiga",
    "vikhr": "vikhr", "novasky": "sky", "baai": "infinity", "uw": "guanaco", "snorkel": "snorkel",
    "salesforce": "sfr", "lightblue": "suzume", "fuseai": "fusechat fuseo", "apple": "openelm",
    "t-tech": "t-lite t-pro",
}  # fmt: skip
# Word of a name -> who made the LLM.
MAKERS: Mapping[str, str] = {word: maker for maker, words in _MAKERS.items() for word in words.split()}

# Words inside names of tuned LLMs that say who tuned them.
TUNERS = (MAKERS.keys() - FAMILIES.keys()) | {"nemotron", "tulu"}

_ORGANISATIONS: Mapping[str, str] = {
    "meta": "meta-llama metaai facebook", "openai": "openai-community", "google": "google-deepmind deepmind gemini",
    "mistralai": "mistral mistral-ai mistral-community", "qwen": "alibaba alibaba-nlp aliyun tongyi qwenlm",
    "deepseek": "deepseek-ai deepseekai", "cohere": "cohereforai coherelabs c4ai cohereai", "xai": "x-ai x.ai",
    "moonshotai": "moonshot moonshot-ai", "zai": "thudm zai-org z-ai zhipu zhipuai", "tii": "tiiuae",
    "ibm": "ibm-granite", "ai21": "ai21labs ai21-labs", "minimax": "minimaxai minimax-ai", "baidu": "paddlepaddle",
    "tencent": "tencent-hunyuan", "baichuan": "baichuan-inc", "snowflake": "snowflake-arctic", "lmsys": "lm-sys",
    "lg": "lgai-exaone lgai", "huggingface": "huggingfaceh4 huggingfacetb", "stepfun": "stepfun-ai",
    "bytedance": "bytedance-seed", "inclusionai": "inclusion-ai", "xiaomi": "xiaomimimo",
    "sber": "ai-sage sberdevices", "tokyotech": "tokyotech-llm", "rednote": "rednote-hilab", "karakuri": "karakuri-ai",
    "berkeley": "berkeley-nest", "liquidai": "liquid", "anthropic": "", "microsoft": "", "nvidia": "", "amazon": "",
    "allenai": "ai2", "cyberagent": "", "rakuten": "", "nexusflow": "", "writer": "", "perplexity": "perplexity-ai",
    "01-ai": "01ai", "upstage": "", "databricks": "", "bigscience": "", "bigcode": "", "eleutherai": "",
    "stabilityai": "", "internlm": "opengvlab", "openbmb": "", "nousresearch": "nous",
    "openassistant": "oasst open-assistant",
    "primeintellect": "prime-intellect", "deepcogito": "", "elyza": "", "reka": "rekaai reka-ai", "apple": "",
    "sambanova": "sambanovasystems", "openchat": "", "novasky": "novasky-ai", "t-tech": "", "swiss-ai": "",
}  # fmt: skip
# Organisation as people write it -> organisation as `TargetLlm` names it.
ORGANISATIONS: Mapping[str, str] = {
    word: name for name, others in _ORGANISATIONS.items() for word in (name, *others.split())
}

# Who converts or serves LLMs of others: says nothing of the LLM.
PROVIDERS = _set(
    "thebloke unsloth bartowski lmstudio-community mlx-community neuralmagic redhatai nm-testing casperhansen "
    "hugging-quants quantfactory mradermacher decapoda-research huggyllama kaitchup turboderp second-state solidrust "
    "openrouter together together-ai togetherai fireworks fireworks-ai groq deepinfra bedrock vertex vertex-ai "
    "azure azure-ai azure-openai anyscale replicate hf hugging-face nvidia-nim nim ollama lm-studio lmstudio cf aws "
    "hyperbolic cerebras novita nebius chutes hosted-vllm vllm sglang amd litellm-proxy modelscope ggml-org api"
)
# Last words that say who serves the LLM, or in which file format.
SERVED = _set(
    "unsloth aws azure togetherai together groq fireworks bedrock vertex hyperbolic deepinfra openrouter cerebras api "
    "hf latest free nitro floor online extended exacto"
)
# Last words behind `instruct`: tuned servers of one provider, the same weights.
SERVED_AFTER_INSTRUCT = frozenset({"turbo", "lite", "reference"})
# Words behind `:` of OpenRouter and Ollama that say nothing of the LLM.
EMPTY_TAGS = frozenset({"beta", "default", "stable", *SERVED})

# Folders that hold LLMs, and files and folders inside the folder of an LLM.
FOLDERS = _set(
    "model models runs run out output outputs checkpoints weights data mnt home hub root opt tmp var srv workspace "
    "accounts publishers deployments engines openai adapters loras lora cache ckpts saved .saved saved_models "
    "saved-models export bucket snapshots blobs refs versions registries foundation-model"
)
INSIDE = re.compile(
    r"(?:checkpoint|ckpt|step|epoch|iter|global[-_]step)[-_]?\d+(?:[-_].*)?|checkpoint.*|[0-9a-f]{40}|snapshots|blobs|refs|"
    r"main|master|final|best|last|latest|merged|hf|models?|weights|versions|adapter|lora|\d+|"
    r"(?:pytorch_|adapter_)?model(?:-\d{5}-of-\d{5})?\.\w+|(?:ud-)?i?q\d_\w+|gguf|fp8|awq|gptq|int[48]|bf16|fp16"
)
FILE = re.compile(r"(?:-\d{5}-of-\d{5})?\.(?:gguf|ggml|bin|safetensors|pth?|onnx|engine|mlpackage|zip|tar(?:\.gz)?)$")
SIZE_ONLY = re.compile(r"(?:\d+x)?\d+(?:\.\d+)?[bm]")
REGION = re.compile(r"^(?:us|eu|apac|jp|au|us-gov|global)\.(?=[a-z])")
REVISION = re.compile(r"-v?\d+:\d+(?::[^/]*)?$")  # of Amazon Bedrock

# Spellings that are mended before a name is cut into words; `-` is the only separator by then.
SPELLINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(rf"(?<![^-]){pattern}(?![^-])"), replacement)
    for pattern, replacement in (
        (r"([a-z]*)(\d)p(\d{1,2})", r"\1\2.\3"),  # Fireworks: v3p1
        (r"gpt-?35", "gpt-3.5"),
        (r"gpt-?4-(1106|0125)(?!-preview)", r"gpt-4-\1-preview"),
        (r"ll(\d(?:\.\d)?)", r"llama-\1"),
        (r"t-tech-t", "t"),
        (r"yandex-gpt", "yandexgpt"),
        (r"code-llama", "codellama"),
        (r"text-davinci", "davinci"),
        (r"command-r(\d+b)", r"command-r-\1"),
        (r"deepseek-chat-v3(\.\d)?", r"deepseek-v3\1"),
        (r"deepseek-coder-v2", "deepseek-v2-coder"),
        (r"glm-4-z1", "glm-z1"),
        (r"claude-3[.-]5-sonnet-(?:v2|new)", "claude-3.5-sonnet-2024-10-22"),
        (r"(llama-?3(?:\.\d)?-\d+b)-(?:versatile|instant|8192)", r"\1-instruct"),  # Groq
        (r"nova-(micro|lite|pro|premier)-v1", r"nova-\1"),
        (r"(?:non?-?(?:think(?:ing)?|reasoning)|think(?:ing)?-off)", "nothink"),
        (r"(?:think|thk)", "thinking"),
        (r"experimental", "exp"),
    )
)
# Some of these have to be in a name before it is worth trying all spellings.
MISSPELT = re.compile(
    r"\dp\d|35|ll\d|ex-g|code-l|t-d|-r\d+b|-v[23]|4-z1|net-new|versatile|instant|8192|nova-|t-tech|think|thk|reasoning|"
    r"experi|1106|0125"
)
TWO_DIGITS = re.compile(r"((?<=[a-z]-)\d|(?<=[a-z])(?<!-q)\d)-(\d)(?![^-])")  # claude-3-5, llama3-1
# A family and a version or size without a separator. The first form is for known families.
GLUED = re.compile(r"([a-z]{2,}?)((?:\d{1,2}(?:\.\d+)*[a-z]?|[vrk]\d(?:\.\d+)*)|(?:\d+x)?\d+(?:\.\d+)?b)")
GLUED_NUMBER = re.compile(r"([a-z]{2,})(\d{1,2}(?:\.\d+)*)")

# A word, a date or a quantisation. Each match starts at a word.
WORDS = re.compile(
    r"(?P<stamp>"
    r"20[12]\d-[01]\d-[0-3]\d|20[12]\d[01]\d[0-3]\d|[0-3]\d[01]\d20[12]\d|(?:0[1-9]|1[0-2])-20[2-3]\d|"
    r"[0-3]\d-[01]\d-[0-3]\d|(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])|2\d[01]\d[0-3]\d|202\d|"
    r"(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])|2[2-9](?:0[1-9]|1[0-2])|00\d"
    r")(?![^-])|(?P<quantisation>"
    r"(?:gptq|awq|gguf|ggml|exl[23]|nvfp4|mxfp[48]|nf4|bnb|hqq|aqlm(?:-pv)?(?:-\dbit)?(?:-\dx\d+)?|autoround|auto-round|eetq|torchao|quantized|mlx|"
    r"onnx|marlin|imat|i1|dwq|qat|quanto|quip|openvino|mlc|q4f16-1|smoothquant|fp[48]|b?f16|[bf]p?16|f32|fp32|int[248]|"
    r"w\d{1,2}a\d{1,2}(?:g\d+)?|\d(?:\.\d)?-?bit|\d(?:\.\d+)?bpw|(?:32|64|128)g|"
    r"(?:ud-)?i?q\d(?:-(?:k-(?:xs|s|m|l|xl)|k|0|1|xxs|xs|s|m|nl|4-4|8-0))?)"
    r"(?:-(?:dynamic|block|tensor|ptpc|kv))*"
    r")(?![^-])|(?P<word>[^-]+)"
)
DAY = re.compile(r"20\d{6}")
DAY_LAST = re.compile(r"\d{4}20\d\d")
STAMPS = frozenset({"exp", "preview", "beta", "alpha", "rc", "new"})

SIZE = re.compile(r"(?:(\d{1,3})x)?([ae])?(\d{1,5}(?:\.\d{1,3})?)(b|m|t)|(\d{1,3})b(\d)")
EXPERTS = re.compile(r"\d{1,3}e")
VERSION = re.compile(r"([a-z]?)(\d{1,2}(?:\.\d+)*)([a-z]{0,2})")
BUDGET = re.compile(r"\d{1,4}(?:\.\d+)?k")
EFFORTS = frozenset({"minimal", "low", "medium", "high", "xhigh"})
VARIANTS: Mapping[str, str] = {
    "it": "instruct", "inst": "instruct", "instruct": "instruct", "instruction": "instruct", "chat": "chat",
    "base": "base", "pt": "base", "coder": "coder", "code": "code", "math": "math", "vl": "vl", "vision": "vision",
    "omni": "omni", "audio": "audio", "multimodal": "multimodal", "codex": "codex", "guard": "guard",
    "search": "search",
}  # fmt: skip
ONE_PATH = frozenset({"scout", "maverick"})  # names state the size of one expert's path
FILLERS = frozenset({"lm", "llm"})  # say nothing behind a family
INSTRUCT = re.compile(r"instruct\d")  # rounds of tuning
TUNED_TO_TALK = frozenset({"instruct", "chat"})
# Words that tell LLMs of one version apart by their size.
TIERS = _set(
    "mini nano micro tiny lite light air flash fast small medium large pro plus max ultra turbo opus sonnet haiku "
    "instant scout maverick nemo premier core edge super next r a oss expanse"
)
THINKING_WORDS = frozenset({"reasoning", "reasoner"})

# LLMs that always think, by their canonical name.
THINKERS = re.compile(
    r"(?<![^-])(?:o[1-9]|r[1-9]t?|qwq|qvq|magistral|gpt-oss|z1|s1|t1|speciale|ring|intellect-3|kimi-k1\.5|"
    r"minimax-m\d(?:\.\d)?|grok-3-mini|grok-4(?!-fast)|gemini-(?:2\.5|3(?:\.\d)?)-pro|gpt-5(?!-(?:chat|main)))(?![^-])"
)

_SEPARATORS = re.compile(r"[ \t_+(),;=\[\]{}|#~]|(?<!\d)\.|\.(?!\d)")
_DASHES = re.compile(r"-{2,}")
_LETTERS = re.compile(r"[^\W\d_]+")


def unpack(name: str) -> tuple[str, str | None, str | None]:
    """The part of an id or a path that names the LLM, the stated organisation, and the stated effort."""
    text = name[-MAX_PATH_CHARS:].strip().lower().replace("\\", "/")
    local = text.startswith(("/", ".", "~")) or text[1:3] == ":/"
    if "://" in text:
        text, local = text.partition("://")[2], True
    if text.startswith("ft:"):  # tuned at OpenAI: ft:gpt-4o-mini-2024-07-18:organisation:name:id
        base, *tuned = text.split(":")[1:]
        text = "-".join((base, "ft", *filter(None, tuned))) if any(tuned) else base
    if text.startswith("@"):  # Cloudflare: @cf/meta/llama
        text = text.partition("/")[2]
    path = [part for part in text.replace("__", "/").split("/") if part.strip()]
    for part in path:
        if part.startswith("models--"):  # Hugging Face cache: models--organisation--name/snapshots/hash
            path, local = part.split("--")[1:], False
            break
    while len(path) > 1 and INSIDE.fullmatch(path[-1]) and path[-2] not in ORGANISATIONS:
        path.pop()
    if not path:
        return "", None, None
    if len(path) > 1 and SIZE_ONLY.fullmatch(path[-1]):  # llama/7b
        path[-2:] = [f"{path[-2]}-{path[-1]}"]
    organisation = _stated(path[:-1], local)
    text, *notes = path[-1].split("@")
    text, *tags = REVISION.sub("", FILE.sub("", text)).split(":")
    tags = [tag for tag in tags if tag not in EMPTY_TAGS]
    effort = None
    for note in notes:
        key, _, value = note.rpartition("=")
        if key.endswith(("reasoning", "effort")):
            if value in EFFORTS:
                effort = value
            elif value == "none":
                tags.append("nothink")
        found = WORDS.fullmatch(note.replace("_", "-"))
        if found is not None and found.lastgroup != "word":  # a date or a quantisation
            tags.append(note)
    text = REGION.sub("", text)
    vendor, _, rest = text.partition(".")
    if rest[:1].isalpha() and vendor in ORGANISATIONS:  # Amazon Bedrock: meta.llama3-1-8b-instruct-v1:0
        organisation = ORGANISATIONS[vendor]
        text = rest if _starts_with_family(rest) else f"{vendor}-{rest}"
    if not text.strip():
        return "", None, None
    text = "-".join((text, *tags))[:MAX_NAME_CHARS].replace("(n=1)", "")
    return _DASHES.sub("-", _SEPARATORS.sub("-", text)).strip("-"), organisation, effort


def _stated(path: Sequence[str], local: bool) -> str | None:
    """The organisation in front of a name. The folders of a machine say nothing, unless their names are known."""
    parts = [part.replace("_", "-").replace(" ", "-") for part in path]
    for part in reversed(parts):
        if part in ORGANISATIONS and part not in FOLDERS:
            return ORGANISATIONS[part]
    if len(parts) != 1 or local or parts[0] in FOLDERS or parts[0] in PROVIDERS:
        return None
    return parts[0]


def _starts_with_family(text: str) -> bool:
    found = _LETTERS.match(text)
    return found is not None and (found[0] in FAMILIES or (found[0] == "o" and text[1:2].isdigit()))


def cut(text: str) -> tuple[list[str], set[int], list[str]]:
    """Words of a name without quantisation, provider and repeated maker; which are stamps; the quantisation."""
    found = [(match[0], match.lastgroup) for match in WORDS.finditer(text)][:MAX_WORDS]
    kept: list[tuple[str, bool]] = []
    quantised = []
    for word, group in found:
        if group == "quantisation":
            quantised.append(word)
        elif word != "latest":
            pieces = _unglued(word, not kept) if group == "word" else (_day(word),)
            kept += [(piece, group == "stamp") for piece in pieces]
    if not kept:
        return [word for word, _ in found], set(), []
    while len(kept) > 1 and kept[-1][0] in SERVED:
        kept.pop()
    if len(kept) > 2 and kept[-1][0] in SERVED_AFTER_INSTRUCT and kept[-2][0] in ("instruct", "inst"):
        quantised.append(kept.pop()[0])
    while len(kept) > 1 and _is_repeated_maker(kept[0][0], kept[1][0]):
        kept.pop(0)
    if tuple(word for word, _ in kept[:2]) in FAMILY_PAIRS:
        kept[:2] = [(f"{kept[0][0]}-{kept[1][0]}", False)]
    return [word for word, _ in kept], {row for row, (_, is_stamp) in enumerate(kept) if is_stamp}, quantised


def _unglued(word: str, is_first: bool) -> tuple[str, ...]:
    """`llama3` as two words. Of an unknown first word only a plain number is cut off."""
    if word in FAMILIES or word in ORGANISATIONS:
        return (word,)
    for pattern in (GLUED, GLUED_NUMBER):
        found = pattern.fullmatch(word)
        if found is not None and (found[1] in FAMILIES or (is_first and pattern is GLUED_NUMBER)):
            return found[1], found[2]
    return (word,)


def _day(stamp: str) -> str:
    """Days with a full year are written in one way, such as `2024-10-22`."""
    if DAY.fullmatch(stamp):
        return f"{stamp[:4]}-{stamp[4:6]}-{stamp[6:]}"
    if DAY_LAST.fullmatch(stamp):
        return f"{stamp[4:]}-{stamp[2:4]}-{stamp[:2]}"
    return stamp


def _is_repeated_maker(word: str, following: str) -> bool:
    """Whether a first word only says who made or serves the LLM that the second word names."""
    maker = ORGANISATIONS.get(word)
    if following == "r1":
        return False
    if maker is not None and MAKERS.get(following) == maker:
        return True
    return _starts_with_family(following) and (
        word == following or word in PROVIDERS or (maker is not None and word not in FAMILIES)
    )


def family_of(parts: Sequence[str]) -> tuple[int, str]:
    """Position of the word that says the family, and the family."""
    if O_SERIES.fullmatch(parts[0]):
        return 0, "o"
    if parts[0] in FAMILIES:
        return 0, FAMILIES[parts[0]]
    for row, word in enumerate(parts):
        if FAMILIES.get(word) in BASES:
            return row, FAMILIES[word]
    for part in parts:
        if found := _LETTERS.match(part):
            return 0, found[0]
    return 0, "-".join(parts)


def second_family(named: Sequence[tuple[str, str]], family: str) -> int:
    """Position of the family that an LLM of another family was tuned from, such as `deepseek-r1-distill-qwen`; or 0."""
    if family in NEVER_TUNED_FROM_OTHERS:
        return 0
    for row, (word, kind) in enumerate(named):
        other = FAMILIES.get(word)
        if row and kind == "word" and other in BASES and other not in (family, "gpt"):
            return row
    return 0
