"""Which source a path is, by its ending."""

from pathlib import Path

from maskfirst.errors import UserError
from maskfirst.sources import Source, parquet, tar, video
from maskfirst.sources.files import Files
from maskfirst.sources.parquet import ParquetTable
from maskfirst.sources.tar import TarShard
from maskfirst.sources.video import Camera, Video


def open_source(path: str, column: str | None = None) -> Source:
    """A tar shard, a Parquet table, a video or a camera (`camera:0`), or else the pictures of a file, a folder or a glob.

    `column`: of pictures, in a table. Raises UserError where it is of anything else, or a library is missing.
    """
    ending = "" if Path(path).is_dir() else path.lower()
    if ending.endswith(parquet.ENDINGS):
        return ParquetTable(path, column)
    if column is not None:
        raise UserError(f"{path}: a column ('{column}') is of tables, whose names end in {', '.join(parquet.ENDINGS)}")
    if path.startswith(video.CAMERA):
        return Camera(path)
    if ending.endswith(tar.ENDINGS):
        return TarShard(path)
    return Video(path) if ending.endswith(video.ENDINGS) else Files([path])
