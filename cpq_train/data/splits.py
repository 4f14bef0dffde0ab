"""Which scenes belong to which split: nuScenes' official ones, and a data set's own in `splits.json`.

`<root>/<version>/splits.json` is the file of nuscenes-devkit 1.2 (`get_scenes_of_custom_split`): name of a
split to a list of scene names. As there, an official name keeps its meaning where the data set holds official
scenes. Several splits joined by "+" are their union.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from os.path import lexists
from pathlib import Path

from pydantic import TypeAdapter

from cpq_train.common.documents import read_json
from cpq_train.common.errors import UserError, shown
from cpq_train.common.schema import list_of, mapping_to, validated

SPLITS_FILE = "splits.json"
UNION = "+"
_KIND: TypeAdapter[dict[str, list[str]]] = TypeAdapter(mapping_to(list_of(str)))


def union(*splits: str | None) -> str | None:
    """Splits, each of which may be a union itself, as one; None where there is none."""
    names = [name for split in splits if split for name in split.split(UNION)]
    return UNION.join(dict.fromkeys(names)) or None


def official_splits(scene_names: Iterable[str]) -> dict[str, list[str]]:
    """The official splits, each with those of its scene names that are among these."""
    from nuscenes.utils.splits import create_splits_scenes

    present = set(scene_names)
    return {
        name: [scene for scene in scenes if scene in present]
        for name, scenes in create_splits_scenes().items()
    }


class Splits:
    """The splits of one version of a data set.

    Args:
        official: what `official_splits` gave for its scenes.
        version: name of the folder of tables; in a mini version "train" and "val" stand for "mini_train" and
            "mini_val".
        file: its `splits.json`, which need not exist.
    """

    def __init__(self, official: Mapping[str, list[str]], version: str, file: Path) -> None:
        self._official, self._is_mini, self._file = official, version.endswith("mini"), file

    @cached_property
    def own(self) -> dict[str, list[str]]:
        """The splits of the file.

        Raises:
            UserError: it is damaged, or says an official split otherwise than nuScenes does.
        """
        if not lexists(self._file):
            return {}
        own = validated(_KIND, read_json(self._file, "splits file"), f"splits file {str(self._file)!r}")
        for name, scenes in own.items():
            self._check_own(name, scenes)
        return own

    def _check_own(self, name: str, scenes: list[str]) -> None:
        what = f"splits file {str(self._file)!r}: split {shown(name)}"
        if not name or UNION in name:
            raise UserError(f"{what}; accepted: a name without {UNION!r}, which joins splits")
        if len(set(scenes)) < len(scenes):
            twice = next(scene for scene in scenes if scenes.count(scene) > 1)
            raise UserError(f"{what} names scene {shown(twice)} twice; accepted: each scene once")
        official = self._official_scenes(name)
        if official and set(official) != set(scenes):
            raise UserError(
                f"{what} is an official one with {len(official)} scenes here, and these are others; "
                "accepted: another name, for nuscenes-devkit would not read this one"
            )

    def _official_scenes(self, name: str) -> list[str]:
        is_short = self._is_mini and name in ("train", "val")
        return self._official.get(f"mini_{name}" if is_short else name, [])

    def scenes_of(self, split: str) -> list[str]:
        """Names of the scenes of a split; none of one that is unknown."""
        parts = (self._official_scenes(name) or self.own.get(name, []) for name in split.split(UNION))
        return list(dict.fromkeys(scene for part in parts for scene in part))

    def is_own(self, split: str) -> bool:
        """Whether the file says which scenes these are, in whole or in part."""
        return any(not self._official_scenes(name) for name in split.split(UNION))

    def check(self, split: str, present: Collection[str], where: str) -> None:
        """See that a split holds scenes, and the data set holds them.

        Args:
            split: its name.
            present: names of the scenes of the data set.
            where: what to call the data set in the message.

        Raises:
            UserError: it does not.
        """
        own = self.own  # a damaged file is told whatever is asked for
        for name in split.split(UNION):
            scenes = self.scenes_of(name)
            if not scenes:
                raise UserError(
                    f"split {name!r} holds no scene of {where}: "
                    f"the splits with scenes there are {self._held()}"
                )
            if absent := set(own.get(name, ())) & set(scenes) - set(present):
                raise UserError(
                    f"splits file {str(self._file)!r}: split {shown(name)} names {len(absent)} scenes that "
                    f"table scene has not, such as {shown(min(absent))}; accepted: scenes of {where}"
                )

    def _held(self) -> str:
        held = {**self.own, **{name: scenes for name, scenes in self._official.items() if scenes}}
        listed = ", ".join(f"{name} ({len(scenes)} scenes)" for name, scenes in held.items() if scenes)
        none = "none, its scene names are not official ones"
        return listed or f"{none}; {SPLITS_FILE} beside the tables names own splits"
