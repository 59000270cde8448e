"""Which of a file's tensors are the weights. People's own code keeps them in sub-dicts and behind prefixes of any name,
beside an optimizer's state, an average or a second network; they are found by the names that stand behind."""

import collections
import re

from utility import UserError, plain
from weights import layouts

# prefix: what stands in front of every name of a set, sub-dicts included, such as "model.module."; renamed: of the
# names behind it; network: such as ResNet50, or None; missing: how many tensors of that network are not there, or None.
WeightSet = collections.namedtuple("WeightSet", "prefix renamed network missing")

LETTERS = 200  # of a name; known networks have 40, the rest is for prefixes
LEAST = 40  # tensors; the smallest network, ResNet8, has 45
# Prefixes inside each other that one name is looked at behind. The names of this project need two, as those of
# paddle.vision stand in them behind "backbone.".
INSIDE = 2

_OPTIMIZER = re.compile(
    r"(?:^|[._/])(?:moment\d?|momentum|velocity|beta\d_pow(?:_acc)?|mean_square|mean_grad|inf_norm"
    r"|avg_squared_(?:grad|update)|exp_avg(?:_sq)?|momentum_buffer)(?:_\d{1,5})?\Z"
)


def is_of_optimizer(name):
    """Whether a tensor of this name belongs to the state of an optimizer, of Paddle or PyTorch."""
    return bool(_OPTIMIZER.search(name[-40:])) or ".master_weights." in f".{name[:LETTERS]}"


def _can_be_weights(name):
    return len(name) <= LETTERS and not is_of_optimizer(name)


def find_sets(tensors):
    """The sets of weights among a file's tensors, the most complete first. It takes time n log n.

    Args:
        tensors: {name: array}, where a name has the keys of the dicts around it in front: "model.conv1.weight".

    Returns: [WeightSet], empty where names are of no layout.
    """
    groups = _by_prefix(tensors)
    large = {prefix: names for prefix, names in groups.items() if len(names) >= LEAST}
    if groups and not large:
        largest = max(groups, key=lambda prefix: len(groups[prefix]))
        large = {largest: groups[largest]}
    sets = []
    for prefix, names in large.items():
        renamed = layouts.rename({name[len(prefix) :]: tensors[name] for name in names})
        if renamed:
            network = layouts.architecture(renamed.tensors)
            missing = layouts.missing(renamed.tensors) if network else None
            sets.append(WeightSet(prefix, renamed, network, missing))
    sets = _without_parts(sets)
    return sorted(sets, key=lambda found: (found.missing is None, found.missing, -len(found.renamed.tensors)))


def _by_prefix(tensors):
    """{prefix: the names behind it, in the file's order} of all prefixes with a layout's sign behind them."""
    names = [name for name in tensors if _can_be_weights(name)]
    prefixes = {layouts.prefix_of_sign(name) for name in names} - {None}
    groups, around = {prefix: [] for prefix in sorted(prefixes)}, []
    # In sorted order the names behind a prefix follow it, without others between them.
    order = [(prefix, -1) for prefix in prefixes] + [(name, position) for position, name in enumerate(names)]
    for name, position in sorted(order):
        while around and not name.startswith(around[-1]):
            around.pop()
        if position < 0:
            around.append(name)
        else:
            for prefix in around[-INSIDE:]:
                groups[prefix].append(position)
    return {prefix: [names[position] for position in sorted(found)] for prefix, found in groups.items()}


def _without_parts(sets):
    """Leaves out a set all of whose tensors are in another: names of this project are such of paddle.vision, too."""
    kept, taken = [], set()
    for found in sorted(sets, key=lambda found: -len(found.renamed.tensors)):
        arrays = {id(array) for array in found.renamed.tensors.values()}
        if not arrays or not arrays <= taken:
            kept.append(found)
            taken |= arrays
    return kept


def choose(sets, model, name, file_name):
    """The one set to take: the only complete one, the only one of `model`, or the one that is called `name`.

    Args:
        sets: what `find_sets` found, at least one. Where none is complete it is the one that lacks the least.
        model: the network that is asked for, or None.
        name: of --weights: a prefix, or words in it, or "".

    Raises: UserError where it takes a choice between several, or where none has the name.
    """
    if name:
        sets = _called(sets, name, file_name)
    complete = [found for found in sets if found.missing == 0]
    asked = [found for found in complete if model and found.network == model.replace("_va", "")]
    best = asked or complete or sets[:1]
    if len(best) > 1:
        flags = [f"--weights={short_prefix(found)}" for found in best]
        raise UserError(
            f"{file_name}: holds {len(best)} sets of weights, each of them complete: {_listed(best)}; choose one: "
            f"{_few(flags, ' or ')}"
        )
    return best[0]


def _called(sets, name, file_name):
    wanted = _words(name)
    exact = [found for found in sets if _words(found.prefix) == wanted]
    text = f".{'.'.join(wanted)}."
    called = exact or [found for found in sets if wanted and text in f".{'.'.join(_words(found.prefix))}."]
    if not called:
        raise UserError(f"--weights={plain(name, 60)}: {file_name} has no weights of that name; it has {_listed(sets)}")
    return called


def _words(prefix):
    return [word.strip("_-: ") for word in re.split("[./]", prefix) if word.strip("_-: ")]


def short_prefix(found):
    """The name of a set, as --weights takes it and messages have it; "." where there is no prefix."""
    return plain(".".join(_words(found.prefix)), 60) or "."


def _listed(sets):
    words = []
    for found in sets:
        name = short_prefix(found)
        words.append(f"{found.network or 'weights'} {'without a prefix' if name == '.' else f'under {name!r}'}")
    return _few(words, " and ")


def _few(words, last):
    if len(words) > 5:
        return f"{', '.join(words[:5])} and {len(words) - 5} more"
    return ", ".join(words[:-1]) + last * (len(words) > 1) + words[-1]


def not_used(tensors, found):
    """What else is in a file than the set `found`, in few words: lone tensors by name, others by their group."""
    prefix, optimizer, groups = found.prefix, 0, {}
    beside = [name for name in tensors if not (name.startswith(prefix) and _can_be_weights(name))]
    for name in (*(prefix + name for name in found.renamed.unused), *beside):
        if is_of_optimizer(name):
            optimizer += 1
        else:
            groups.setdefault(_group(name, prefix), []).append(name)
    words = []
    for group, names in groups.items():
        words.append(names[0].removeprefix(prefix) if len(names) == 1 else f"{plain(group)}.* ({len(names)} tensors)")
    return words + [f"an optimizer's state ({optimizer} tensors)"] * (optimizer > 0)


def _group(name, prefix):
    """The words of a name up to the first that is not the prefix's."""
    words, around = name[:LETTERS].split("."), prefix.split(".")
    same = next((n for n, (one, other) in enumerate(zip(words, around)) if one != other), 0)
    return ".".join(words[: same + 1])
