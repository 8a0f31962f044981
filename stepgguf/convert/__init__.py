"""A checkpoint or a GGUF in, a GGUF out.

The choice that the command line offers is here, where reading it loads nothing else.
"""

from typing import Literal, TypeAlias

MtpMode: TypeAlias = Literal["include", "separate", "drop"]  # MTP blocks in the file, in one of their own, or nowhere
