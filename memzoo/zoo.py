"""The catalogue: one row per architecture, and the functions that read it."""

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import jax

from memzoo.contract import check_numbers, nearest
from memzoo.ops.checks import check_impl


class Card(NamedTuple):
    """What the catalogue says of one architecture. Its class is `flax_class` of `module`."""

    name: str
    family: str
    title: str  # of the paper
    arxiv: str  # its number, or "" where it has none
    state: str  # "constant" in T, or "grows"
    forms: tuple[str, ...]  # what `impl` takes besides "auto"; the first is the definition
    line: str  # what it is, in one line
    flax_class: str

    @property
    def module(self) -> str:
        return f"memzoo.mixers.{self.name}"


BEGIN, END = "<!-- table begins -->\n", "<!-- table ends -->\n"
_LINEAR = ("scan", "associative", "chunk")
_KERNEL = (*_LINEAR, "pallas")

# fmt: off
_CARDS = (
    Card("attention", "attention", "Attention Is All You Need", "1706.03762", "constant", ("scan", "chunk"),
         "softmax over the last `window` tokens and `sinks` first ones, RoPE, grouped keys", "Attention"),
    Card("lstm", "gated rnn", "Learning to Forget: Continual Prediction with LSTM", "", "constant", ("scan", "newton"),
         "input, forget and output gates around an additive cell", "LSTM"),
    Card("slstm", "gated rnn", "xLSTM: Extended Long Short-Term Memory", "2405.04517", "constant", ("scan", "newton"),
         "an LSTM with an exponential input gate, a normaliser and a stabiliser; heads that do not meet", "SLSTM"),
    Card("gru", "gated rnn", "Learning Phrase Representations using RNN Encoder-Decoder", "1406.1078", "constant",
         ("scan", "newton"), "reset and update gates around one state", "GRU"),
    Card("elman", "gated rnn", "Finding Structure in Time", "", "constant", ("scan", "newton"),
         "hidden units that see their own last values; with ReLU the IRNN", "Elman"),
    Card("indrnn", "gated rnn", "Independently Recurrent Neural Network (IndRNN)", "1803.04831", "constant",
         ("scan", "newton"), "each unit with one bounded recurrent weight, on its own; ReLU", "IndRNN"),
    Card("leaky_rnn", "gated rnn", "Emergent mechanisms for long timescales depend on training curriculum",
         "2309.12927", "constant", ("scan", "newton"), "no gates; a learned time constant per unit", "LeakyRNN"),
    Card("wave_rnn", "gated rnn", "Traveling Waves Encode the Recent Past and Enhance Sequence Learning",
         "2309.08045", "constant", ("scan", "newton"),
         "a convolution along rings of units, which begin as shift registers", "WaveRNN"),
    Card("lem", "gated rnn", "Long Expressive Memory for Sequence Modeling", "2110.04744", "constant",
         ("scan", "newton"), "two coupled states that choose how far to move; bounded, and so are their errors", "LEM"),
    Card("elm", "gated rnn", "The Expressive Leaky Memory Neuron", "2306.16922", "constant", ("scan", "newton"),
         "traces of inputs, summed by branch, and slow memories that a small network adjusts", "ELM"),
    Card("rmc", "gated rnn", "Relational recurrent neural networks", "1806.01822", "constant", ("scan",),
         "slots of memory that attend to one another and to the token, behind an LSTM's gates", "RMC"),
    Card("min_gru", "gated rnn", "Were RNNs All We Needed?", "2410.01201", "constant", _KERNEL,
         "a GRU whose gates see the token alone: linear in its state", "MinGRU"),
    Card("min_lstm", "gated rnn", "Were RNNs All We Needed?", "2410.01201", "constant", _KERNEL,
         "an LSTM whose gates see the token alone and sum to 1", "MinLSTM"),
    Card("bilinear_rnn", "gated rnn", "Revisiting Bi-Linear State Transitions in Recurrent Neural Networks",
         "2505.21749", "constant", _LINEAR, "the token chooses a linear map of the state, and nothing is added",
         "BilinearRNN"),
    Card("ffm", "gated rnn", "Reinforcement Learning with Fast and Forgetful Memory", "2310.04128", "constant", _LINEAR,
         "traces that fade and turn at fixed rates, each rate with each other", "FFM"),
    Card("lru", "ssm", "Resurrecting Recurrent Neural Networks for Long Sequences", "2303.06349", "constant", _LINEAR,
         "a complex diagonal linear recurrence, stable by exponential parameters", "LRU"),
    Card("mamba", "ssm", "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", "2312.00752", "constant",
         _LINEAR, "a decay per channel and state; step, input and output depend on the token", "Mamba"),
    Card("polarized_mamba", "ssm", "Understanding and Mitigating Bottlenecks of State Space Models", "2501.00658",
         "constant", _LINEAR, "Mamba with one state that never forgets and one that always does", "PolarizedMamba"),
    Card("long_mamba", "ssm", "LongMamba: Enhancing Mamba's Long Context Capabilities", "2504.16053", "constant",
         _LINEAR, "a trained Mamba whose slow channels skip tokens of small step, for longer contexts", "LongMamba"),
    Card("mem_mamba", "ssm", "MemMamba: Rethinking Memory Patterns in State Space Model", "2510.03279", "constant",
         ("scan", "chunk"), "Mamba, a pool of notes on important tokens, and attention to it", "MemMamba"),
    Card("mamba2", "ssm", "Transformers are SSMs", "2405.21060", "constant", _KERNEL,
         "state-space duality: one input-dependent decay per head", "Mamba2"),
    Card("hippo", "ssm", "HiPPO: Recurrent Memory with Optimal Polynomial Projections", "2008.07669", "constant",
         ("scan", "newton"), "a gated RNN around a memory of all its past, kept as a polynomial", "HiPPO"),
    Card("lssl", "ssm", "Combining Recurrent, Convolutional, and Continuous-time Models", "2110.13985", "constant",
         ("scan", "associative", "conv"), "HiPPO's differential equation per feature, with a trained step", "LSSL"),
    Card("s4", "ssm", "Efficiently Modeling Long Sequences with Structured State Spaces", "2111.00396", "constant",
         ("scan", "associative", "conv"), "HiPPO's memory of each feature, learned, as a convolution", "S4"),
    Card("s4d", "ssm", "On the Parameterization and Initialization of Diagonal State Space Models", "2206.11893",
         "constant", (*_LINEAR, "conv"), "S4 without its low rank: decaying oscillations", "S4D"),
    Card("s5", "ssm", "Simplified State Space Layers for Sequence Modeling", "2208.04933", "constant", _LINEAR,
         "one diagonal SSM of many inputs and outputs, from HiPPO's eigenvalues", "S5"),
    Card("smr", "ssm", "SMR: State Memory Replay for Long Sequence Modeling", "2405.17534", "constant", _LINEAR,
         "a diagonal SSM whose inputs are rescaled by a gate that sees the last few", "SMR"),
    Card("rg_lru", "ssm", "Griffin", "2402.19427", "constant", _KERNEL,
         "a real diagonal recurrence with a recurrence gate and an input gate", "RGLRU"),
    Card("stable_ssm", "ssm", "StableSSM", "2311.14495", "constant", _LINEAR,
         "a diagonal SSM whose decays are a function of the weights that suits gradient descent", "StableSSM"),
    Card("linear_attention", "linear attention", "Transformers are RNNs", "2006.16236", "constant", _KERNEL,
         "positive feature maps, a matrix memory and its normaliser", "LinearAttention"),
    Card("retnet", "linear attention", "Retentive Network", "2307.08621", "constant", _KERNEL,
         "a fixed decay per head, rotary queries and keys", "RetNet"),
    Card("mlstm", "linear attention", "xLSTM: Extended Long Short-Term Memory", "2405.04517", "constant", _LINEAR,
         "a matrix memory with an exponential input gate, a normaliser and a stabiliser", "MLSTM"),
    Card("lightning", "linear attention", "Various Lengths, Constant Speed", "2405.17381", "constant", _LINEAR,
         "a fixed decay per head and layer, then a norm over heads and a gate", "Lightning"),
    Card("based", "linear attention", "Simple linear attention language models balance the recall-throughput tradeoff",
         "2402.18668", "constant", _LINEAR, "softmax attention with exp as its second-order Taylor series", "Based"),
    Card("jrt", "linear attention", "Just read twice: closing the recall gap for recurrent language models",
         "2407.05483", "constant", _LINEAR, "Based with more keys for a prefix, which may look ahead in itself", "JRT"),
    Card("aaren", "linear attention", "Attention as an RNN", "2405.13956", "constant", _LINEAR,
         "softmax attention whose query is learned, the same for all tokens", "Aaren"),
    Card("gla", "linear attention", "Gated Linear Attention Transformers", "2312.06635", "constant", _KERNEL,
         "an input-dependent decay per key channel", "GLA"),
    Card("hgrn", "linear attention", "Hierarchically Gated Recurrent Neural Network", "2311.04823",
         "constant", _LINEAR, "a complex recurrence whose forget gate has a lower bound, in the paper one per layer",
         "HGRN"),
    Card("hgrn2", "linear attention", "HGRN2: Gated Linear RNNs with State Expansion", "2404.07904", "constant",
         _LINEAR, "HGRN with a matrix state: GLA whose key is what the forget gate forgets", "HGRN2"),
    Card("rwkv7", "linear attention", "RWKV-7 'Goose' with Expressive Dynamic State Evolution", "2503.14456",
         "constant", _LINEAR, "the delta rule with a decay and a learning rate per key channel", "RWKV7"),
    Card("mom", "linear attention", "MoM: Linear Sequence Modeling with Mixture-of-Memories", "2502.13685", "constant",
         _LINEAR, "Gated DeltaNet with many memories, of which a router chooses a few per token", "MoM"),
    Card("causal_rn", "linear attention", "An All-MLP Sequence Modeling Architecture That Excels at Copying",
         "2406.16168", "constant", ("scan", "chunk"),
         "exp of a norm of each pair of tokens, summed over the last `window` of them", "CausalRN"),
    Card("liger", "linear attention", "Liger: Linearizing Large Language Models to Gated Recurrent Structures",
         "2503.01496", "constant", ("scan", "chunk"),
         "a softmax layer's weights as GLA, gates from its keys, and a softmax window; no new parameters", "Liger"),
    Card("block_linear", "linear attention", "SANA-Video", "2509.24695", "constant", _LINEAR,
         "ReLU linear attention, turned by place; tokens of a block see each other",
         "BlockLinear"),
    Card("spiking_gla", "linear attention", "SpikingBrain: Spiking Brain-inspired Large Models", "2509.05276",
         "constant", ("scan", "chunk"), "GLA, a softmax window beside it if wanted, and projections of spike counts",
         "SpikingGLA"),
    Card("lizard", "linear attention", "Lizard: An Efficient Linearization Framework for Large Language Models",
         "2507.09025", "constant", ("scan", "chunk"),
         "what to learn a softmax layer with: gated linear attention and a softmax window with sinks", "Lizard"),
    Card("deltanet", "delta rule", "Parallelizing Linear Transformers with the Delta Rule", "2406.06484", "constant",
         _KERNEL, "writes correct what the memory holds under a key", "DeltaNet"),
    Card("gated_deltanet", "delta rule", "Gated Delta Networks", "2412.06464", "constant", _KERNEL,
         "the delta rule, and a gate that forgets", "GatedDeltaNet"),
    Card("delta_product", "delta rule", "DeltaProduct: Improving State-Tracking in Linear RNNs", "2502.10297",
         "constant", _LINEAR, "steps of the delta rule per token, which together can turn the memory", "DeltaProduct"),
    Card("kda", "delta rule", "Kimi Linear: An Expressive, Efficient Attention Architecture", "2510.26692", "constant",
         _LINEAR, "the delta rule, and a gate per key channel that forgets", "KDA"),
    Card("ttt_linear", "test-time memory", "Learning to (Learn at Test Time): RNNs with Expressive Hidden States",
         "2407.04620", "constant", ("scan", "chunk"), "a linear model, trained on each token", "TTTLinear"),
    Card("ttt_mlp", "test-time memory", "Learning to (Learn at Test Time): RNNs with Expressive Hidden States",
         "2407.04620", "constant", ("scan", "chunk"), "two layers, trained on each token while they read", "TTTMLP"),
    Card("titans", "test-time memory", "Titans: Learning to Memorize at Test Time", "2501.00663", "constant",
         ("scan", "chunk"), "a network whose weights learn while it reads, with momentum and decay", "Titans"),
    Card("moneta", "test-time memory", "It's All Connected: A Journey Through Test-Time Memorization", "2504.13173",
         "constant", ("scan", "chunk"), "learns by the p-norm of its error, weights kept by a q-norm", "Moneta"),
    Card("yaad", "test-time memory", "It's All Connected: A Journey Through Test-Time Memorization", "2504.13173",
         "constant", ("scan", "chunk"), "learns by Huber's loss, which outliers cannot drag away", "Yaad"),
    Card("memora", "test-time memory", "It's All Connected: A Journey Through Test-Time Memorization", "2504.13173",
         "constant", ("scan", "chunk"), "weights that are distributions, learned in their logarithms", "Memora"),
    Card("omega_net", "test-time memory", "ATLAS: Learning to Optimally Memorize the Context at Test Time",
         "2505.23735", "constant", ("scan", "chunk"), "learns the last tokens at once, behind polynomial features",
         "OmegaNet"),
    Card("atlas", "test-time memory", "ATLAS: Learning to Optimally Memorize the Context at Test Time", "2505.23735",
         "constant", ("scan", "chunk"), "learns the last tokens at once, by Muon", "Atlas"),
    Card("dot", "test-time memory", "ATLAS: Learning to Optimally Memorize the Context at Test Time", "2505.23735",
         "constant", ("scan", "chunk"), "learns the last tokens at once, behind attention's kernel", "Dot"),
    Card("lattice", "test-time memory", "Lattice: Learning to Efficiently Compress the Memory", "2504.05646",
         "constant", ("scan", "chunk"), "slots that take only what is orthogonal to what they hold", "Lattice"),
    Card("rat", "hybrid", "RAT: Bridging RNN Efficiency and Attention Accuracy", "2507.04416", "constant",
         ("scan", "chunk"), "a gated recurrence inside chunks, softmax attention across their ends", "RAT"),
    Card("hax", "hybrid", "Overcoming Long-Context Limitations of State-Space Models", "2507.00449", "constant",
         ("scan", "chunk"), "Mamba-2, and attention to the query's hash bucket and to selected keys", "HAX"),
    Card("gam", "associative", "Gated Associative Memory: A Parallel O(N) Architecture", "2509.00605", "constant",
         ("scan", "conv"), "a short convolution, its only state, and a bank of learned slots, behind gates", "GAM"),
    Card("esn", "reservoir", "The 'echo state' approach to analysing and training recurrent neural networks", "",
         "constant", ("scan", "newton"), "a random network that is not trained, and a linear readout that is", "ESN"),
    Card("res_esn", "reservoir", "Deep Residual Echo State Networks", "2508.21172", "constant", ("scan", "newton"),
         "an echo state network whose state also goes around by an orthogonal matrix", "ResESN"),
    Card("res_rmn", "reservoir", "Residual Reservoir Memory Networks", "2508.09925", "constant", ("scan", "newton"),
         "a ring that keeps all inputs as they were, read by a residual echo state network", "ResRMN"),
    Card("onion_esn", "reservoir", "Onion Echo State Networks: A Preliminary Analysis of Dynamics", "", "constant",
         ("scan", "newton"), "small reservoirs side by side, the eigenvalues of each in a ring of its own", "OnionESN"),
    Card("quantum_reservoir", "reservoir", "Quantum Reservoir Computing for Corrosion Prediction in Aerospace",
         "2505.22837", "constant", ("scan", "associative"),
         "small quantum systems side by side, simulated, which forget at rates of their own", "QuantumReservoir"),
)
# fmt: on

_BY_NAME = {card.name: card for card in _CARDS}


def names(family: str | None = None) -> tuple[str, ...]:
    """The names of all architectures, or of one family, in the order of the catalogue.

    Raises ValueError for an unknown family, with the nearest ones.
    """
    families = dict.fromkeys(card.family for card in _CARDS)
    if family is not None and family not in families:
        raise ValueError(f"family: unknown family {family!r}; {nearest(family, families)}")
    return tuple(card.name for card in _CARDS if family in (None, card.family))


def card(name: str) -> Card:
    """The catalogue's row for `name`. Raises ValueError for an unknown name, with the nearest ones."""
    if name not in _BY_NAME:
        raise ValueError(f"name: unknown architecture {name!r}; {nearest(str(name), _BY_NAME)}")
    return _BY_NAME[name]


def make(name: str, /, *, width: int, **fields: Any) -> Any:
    """A mixer by name, as a flax.linen.Module. Fields default to the paper's values, or the file says why not.

    width: D, the size of the last axis in and out. fields: the module's own, listed in its class, and Flax's `name`, of
    its parameters in the module it is made in, and `parent` (None: it belongs to none, wherever it is made).
    Raises ValueError for an unknown name, field or `impl`, with the nearest ones, and for sizes that do not fit;
    NotImplementedError for an `impl` that the architecture does not have.
    """
    row = card(name)
    flax_class = getattr(importlib.import_module(row.module), row.flax_class)
    known = [field for field in flax_class.__dataclass_fields__ if field not in ("parent", "name")]
    for field in fields:
        if field not in (*known, "parent", "name"):
            raise ValueError(f"{field}: {name} has no such field; {nearest(field, known)}")
    check_impl(name, fields.get("impl", "auto"), row.forms)
    alone = flax_class(**{**fields, "width": width, "parent": None})
    check_numbers(alone)
    jax.eval_shape(lambda: alone.initial_state(1))  # the sizes are checked there, and no array is made
    return flax_class(width=width, **fields)


def table() -> str:
    """The catalogue as a Markdown table, its links relative to the repository."""
    head = "| name | family | paper | forms | state | what it is |\n|---|---|---|---|---|---|\n"
    lines = []
    for row in _CARDS:
        link = f"[`{row.name}`]({row.module.replace('.', '/')}.py)"
        paper = f"[{row.title}](https://arxiv.org/abs/{row.arxiv})" if row.arxiv else row.title
        forms = ", ".join(f"`{form}`" for form in row.forms)
        lines.append(f"| {link} | {row.family} | {paper} | {forms} | {row.state} | {row.line} |\n")
    return head + "".join(lines)


def write_table(readme: str | Path) -> None:
    """Puts the table between the two markers of a README."""
    path = Path(readme)
    before, rest = path.read_text().split(BEGIN, 1)
    path.write_text(before + BEGIN + table() + END + rest.split(END, 1)[1])
