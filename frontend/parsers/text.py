"""Text with reasoning and calls in it: how one passes into the other."""

from dataclasses import dataclass

from frontend.parsers.grammar import Grammar, Output, ToolFormat
from frontend.parsers.reader import Malformed, Markers, Reader, Steps


@dataclass(frozen=True, slots=True)
class ThinkTags:
    """The tags between which one model family reasons."""

    opens: tuple[str, ...] = ("<think>",)
    closes: tuple[str, ...] = ("</think>",)
    inside: bool = False
    """The output begins with reasoning: the opening tag is in the prompt, or nowhere."""
    interrupts: tuple[str, ...] = ()
    """Markup of calls that ends reasoning as well, since the model forgets to close it."""
    dropped: tuple[str, ...] = ()
    """Tags around the answer, which say nothing."""

    def inside_after(self, prompt: str) -> bool:
        """Whether the output begins with reasoning, given the rendered prompt.

        A prompt that ends in a tag decides, as templates do when thinking is switched on or off;
        else the family's habit.
        """
        end = prompt[-_PROMPT_END_CHARS:].rstrip()
        if end.endswith(self.opens):
            return True
        if end.endswith(self.closes):
            return False
        return self.inside


_PROMPT_END_CHARS = 128


def text_grammar(calls_as: ToolFormat | None, tags: ThinkTags | None, inside: bool) -> Grammar:
    """Reasoning between its tags, calls where they open, all else content. ValueError: the two
    formats have markers that can't be told apart.

    inside: begins with reasoning, and an opening tag at the beginning is taken as a repetition.
    Reasoning that nothing closes goes up to the end; nothing opens calls in it, as no tag of its
    opens reasoning within calls. A closing tag that closes nothing is content.

    What is malformed goes out as content, and from there on text is read. Spaces and line ends
    after a reasoning tag, and between the beginning, calls and the end, are layout and dropped.
    """
    tags = tags or ThinkTags((), ())
    openings = Markers(*(calls_as.opening if calls_as else ()), *tags.opens, *tags.dropped)
    firsts = Markers(*(calls_as.first if calls_as else ()))
    opens = Markers(*tags.opens)
    thought_ends = Markers(*tags.closes, *tags.interrupts)

    def grammar(reader: Reader, output: Output) -> Steps[None]:
        after_layout = True
        if inside:
            yield from reader.take(opens)
            yield from thought(reader, output)
        while True:
            marker = ""
            if after_layout:
                # Marked, so that the layout is there still if what it precedes is no call.
                reader.mark()
                marker = (yield from reader.take(openings)) or (yield from reader.take(firsts))
                reader.pos -= len(marker)
            if not marker:
                reader.unmark()
                if after_layout and output.ended and reader.only_layout_left():
                    return
                marker = yield from reader.until(openings, output.content)
                if not marker:
                    return
                reader.mark()
            after_layout = True
            if marker in tags.dropped:
                reader.unmark()
                reader.pos += len(marker)
                yield from reader.space()
            elif marker in tags.opens:
                reader.unmark()
                reader.pos += len(marker)
                yield from thought(reader, output)
            else:
                after_layout = yield from calls(reader, output, marker)

    def thought(reader: Reader, output: Output) -> Steps[None]:
        """Read reasoning after its opening tag, and the closing one."""
        yield from reader.space()
        tag = yield from reader.until(thought_ends, output.reasoning)
        if tag in tags.closes:
            reader.pos += len(tag)
            yield from reader.space()

    def calls(reader: Reader, output: Output, marker: str) -> Steps[bool]:
        """Read calls; False if something malformed ended them."""
        assert calls_as is not None
        try:
            yield from calls_as.calls(reader, output, marker)
        except Malformed:
            output.give_up(reader.taken())
            return False
        finally:
            reader.unmark()
        return True

    return grammar
