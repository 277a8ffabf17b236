"""The screen of `kvtier top`: lines and three tables, refreshed at each interval. Fits 80 x 24."""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen, Screen
from textual.widgets import DataTable, Footer, Static
from textual.widgets.data_table import RowDoesNotExist

from graphs import observer
from graphs.observer import EVERY_SECONDS_MAX, EVERY_SECONDS_MIN, Frame, Observer, Options

_WIDTHS = {
    "workers": (17, 8, 5, 5, 6, 5, 5, 7, 5, 12),
    "targets": (22, 6, 5, 10, 10, 8, 8, 11),
    "decisions": (13, 7, 17, 7, 6, 10, 10, 9),
}
_LEFT = {"worker", "target", "decision", "outcome"}


class Detail(ModalScreen[None]):
    """One decision in full."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,enter,q", "dismiss", "Back"),
    ]

    def __init__(self, text: str):
        super().__init__()
        self._text = text

    def compose(self) -> ComposeResult:
        with VerticalScroll():
            yield Static(self._text, markup=False)
        yield Footer()


class TopApp(App[None]):
    """Refreshes every `options.every` seconds until the user quits."""

    CSS = """
    #head { height: auto; }
    #alarms { height: auto; max-height: 3; color: $text-error; }
    DataTable { height: auto; max-height: 5; scrollbar-size-vertical: 1; }
    #decisions { height: 1fr; max-height: 100%; min-height: 4; }
    Detail > VerticalScroll { height: 1fr; background: $surface; padding: 0 1; }
    """
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("p,space", "pause", "Pause"),
        Binding("plus,equals_sign", "faster", "Faster", key_display="+"),
        Binding("minus", "slower", "Slower", key_display="-"),
    ]

    def __init__(self, options: Options):
        super().__init__(ansi_color=True)
        self._every = options.every
        self._observer = Observer(options)
        self._frame: Frame | None = None
        self._paused = False
        self._changed = asyncio.Event()

    def compose(self) -> ComposeResult:
        yield Static("looking ...", id="head", markup=False)
        yield Static("", id="alarms", markup=False)
        for name, titles in (
            ("workers", observer.WORKERS),
            ("targets", observer.TARGETS),
            ("decisions", observer.DECISIONS),
        ):
            table: DataTable[Text] = DataTable(id=name, cell_padding=0, cursor_type="row", zebra_stripes=False)
            for title, width in zip(titles, _WIDTHS[name], strict=True):
                table.add_column(_cell(title, title), width=width)
            yield table
        yield Footer()

    def on_mount(self) -> None:
        self._table("decisions").focus()
        self.run_worker(self._look(), exclusive=True)

    async def _look(self) -> None:
        async with self._observer:
            while True:
                if not self._paused:
                    self._frame = await self._observer.look()
                    self._show()
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), self._every)

    def _show(self) -> None:
        frame = self._frame
        if frame is None:
            return
        how = "paused" if self._paused else f"every {self._every:g} s"
        self._below.query_one("#head", Static).update("\n".join(observer.headlines(frame)) + f"   [{how}]")
        self._below.query_one("#alarms", Static).update("\n".join(observer.alarm_lines(frame)))
        self._fill("workers", observer.WORKERS, observer.worker_rows(frame))
        self._fill("targets", observer.TARGETS, observer.target_rows(frame))
        self._fill("decisions", observer.DECISIONS, [observer.decision_row(one) for one in frame.decisions])

    def _fill(self, name: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Fill a table; the cursor stays on its row, even if that has moved."""
        table = self._table(name)
        chosen = None
        if table.cursor_row > 0:  # on the first row, the cursor stays on the latest decision
            chosen = table.coordinate_to_cell_key(table.cursor_coordinate).row_key
        table.clear()
        for row in rows:
            table.add_row(*(_cell(title, text) for title, text in zip(titles, row, strict=True)), key=row[0])
        if chosen is not None and chosen.value is not None:
            with contextlib.suppress(RowDoesNotExist):
                table.move_cursor(row=table.get_row_index(chosen.value))

    @property
    def _below(self) -> Screen[object]:
        """The screen with the tables, whatever is shown above it."""
        return self.screen_stack[0]

    def _table(self, name: str) -> "DataTable[Text]":
        return self._below.query_one(f"#{name}", DataTable)

    def action_pause(self) -> None:
        self._paused = not self._paused
        self._show()
        self._changed.set()

    def action_faster(self) -> None:
        self._set_every(self._every / 2)

    def action_slower(self) -> None:
        self._set_every(self._every * 2)

    def _set_every(self, seconds: float) -> None:
        self._every = min(EVERY_SECONDS_MAX, max(EVERY_SECONDS_MIN, seconds))
        self._show()
        self._changed.set()

    async def on_data_table_row_selected(self, event: "DataTable.RowSelected") -> None:
        """Handle enter or a click."""
        if event.data_table.id == "decisions" and event.row_key.value:
            self.push_screen(Detail(await self._observer.explain(event.row_key.value)))


def _cell(title: str, text: str) -> Text:
    if title in _LEFT:
        return Text(f" {text}", no_wrap=True)
    return Text(text, justify="right", no_wrap=True)
