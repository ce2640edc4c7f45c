"""Storage behind URLs: fsspec's file systems, and S3 by pyarrow, which is installed anyway.

fsspec's own for S3, s3fs, cannot be installed here: its aiobotocore needs an older botocore than that of the
embedded corpus.
"""

from typing import Any
from urllib.parse import urlsplit


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Raises whatever the file system raises.

    S3 takes credentials, region and endpoint where the AWS tools do: AWS_ACCESS_KEY_ID, AWS_PROFILE,
    AWS_REGION, AWS_ENDPOINT_URL, ~/.aws, or the role of the machine.
    """
    if url.startswith("s3://"):
        from fsspec.implementations.arrow import ArrowFSWrapper
        from pyarrow.fs import FileSystem

        system, _ = FileSystem.from_uri(f"s3://{urlsplit(url).netloc}")  # finds the bucket's region
        return ArrowFSWrapper(system), ArrowFSWrapper._strip_protocol(url)
    import fsspec

    return fsspec.core.url_to_fs(url)
