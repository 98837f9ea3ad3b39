"""The layouts that one node knows of one job, with the sizes and stripes that follow from them.

Covers remembering and forgetting; which layout is the job's newest plan is in `Job`.
"""

from dataclasses import dataclass, field

from holdfast.daemon.core.context import Context
from holdfast.protocol import limits
from holdfast.protocol.layout import Geometry, Layout


@dataclass(slots=True)
class Layouts:
    """Layouts by their id; geometries are made when they are first asked for."""

    ctx: Context
    known: dict[int, Layout] = field(default_factory=dict)
    _geometries: dict[int, Geometry] = field(default_factory=dict)

    def get(self, layout_id: int | None) -> Layout | None:
        """A layout by its id, None if it is not known."""
        return None if layout_id is None else self.known.get(layout_id)

    def geometry(self, layout_id: int) -> Geometry:
        """Sizes and stripes of a known layout."""
        if layout_id not in self._geometries:
            self._geometries[layout_id] = Geometry(
                layout=self.known[layout_id],
                placement=self.ctx.placement,
                parity_count=self.ctx.config.parity,
                chunk_bytes=self.ctx.config.chunk_bytes,
            )
        return self._geometries[layout_id]

    def learn(self, layout: Layout, *, needed: set[int | None]) -> int:
        """Remember a layout; beyond LAYOUTS_KEPT those are forgotten that are not needed. Returns its id."""
        self.known.setdefault(layout.layout_id, layout)
        for layout_id in set(self.known) - needed - {layout.layout_id}:
            if len(self.known) > limits.LAYOUTS_KEPT:
                del self.known[layout_id]
                self._geometries.pop(layout_id, None)
        return layout.layout_id

    def renew(self, layout: Layout) -> None:
        """Put a layout in the place of an equal one: its cadence and version may be newer."""
        self.known[layout.layout_id] = layout
        self._geometries.pop(layout.layout_id, None)
