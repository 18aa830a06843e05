"""Bytes in, frames out: the incremental half of the request plane's framing.

A frame is a u32 big-endian length and that many bytes. TCP delivers them cut anywhere; this turns
any cutting back into the same frames. Pure: no socket, and no knowledge of what a frame says.
"""

from workers.errors import FrameTooLarge
from workers.protocol import FRAME_BYTES_MAX

LENGTH_BYTES = 4


class FrameReader:
    """Collects the bytes of one connection. Holds at most one incomplete frame.

    Linear in the bytes fed: a byte is copied once into its frame, and once more if its frame came
    in several pieces.
    """

    __slots__ = ("_frame_bytes_max", "_rest")

    def __init__(self, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._frame_bytes_max = frame_bytes_max
        self._rest = bytearray()

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the frame that is not complete yet."""
        return len(self._rest)

    def feed(self, data: bytes) -> list[bytes | bytearray]:
        """The bodies of the frames that `data` completes, in order; often none or one.

        Raises FrameTooLarge as soon as a length says so; the connection is of no use after that.
        """
        source: bytes | bytearray = data
        if self._rest:
            self._rest += data
            source = self._rest
        bodies: list[bytes | bytearray] = []
        start, available = 0, len(source)
        while available - start >= LENGTH_BYTES:
            size = int.from_bytes(source[start : start + LENGTH_BYTES], "big")
            if size > self._frame_bytes_max:
                raise FrameTooLarge(size, self._frame_bytes_max)
            end = start + LENGTH_BYTES + size
            if end > available:
                break
            bodies.append(source[start + LENGTH_BYTES : end])
            start = end
        if source is self._rest:
            del self._rest[:start]
        elif start < available:
            self._rest += source[start:]
        return bodies
