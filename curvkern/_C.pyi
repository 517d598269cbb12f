"""The native extension. Launchers take addresses, sizes, scalars and codes; see csrc/launch.h."""

ABI: int
CPU_ISA: str
CUDA_ARCHS: str
CUDA_VERSION: str
ROLLBACK_BLOCK: int
SELECT_SCRATCH: int
MIX_CHUNK: int
MIX_WAYS: int
VECTORS_CHUNK: int

def device_count() -> int: ...
def large_pages(data: int, bytes: int) -> None: ...
def __getattr__(name: str) -> object: ...  # pyright: ignore[reportIncompleteStub]
