"""Uploaded files and volumes: small contents travel in RPCs, large ones over plain HTTP."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from aiohttp import web
from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal_proto import api_pb2

if TYPE_CHECKING:
    from tests.helpers.modal_server.state import State

BLOCK = 8 * 1024 * 1024
"""Bytes of a volume's file that the client reads with one HTTP request."""


class Storage:
    """RPCs and HTTP routes for contents and volumes."""

    def __init__(self, state: State) -> None:
        self._state = state

    # Contents

    async def blob_create(self, request):
        key = self._state.new_id("bl")
        urls = api_pb2.UploadUrlList(items=[f"{self._state.http_url}/contents/{key}"])
        return api_pb2.BlobCreateResponse(blob_ids=[key], upload_urls=urls)

    async def mount_batched_check_existence(self, request):
        hashes = request.sha256_hex_hashes
        missing = [key for key in hashes if not self._state.content(key).exists()]
        return api_pb2.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=missing)

    async def mount_put_file(self, request):
        target = self._state.content(request.sha256_hex)
        source = request.WhichOneof("data_oneof")  # None asks whether the file exists
        if source == "data":
            target.write_bytes(request.data)
        elif source == "data_blob_id":
            self._state.content(request.data_blob_id).rename(target)
        return api_pb2.MountPutFileResponse(exists=target.exists())

    async def mount_get_or_create(self, request):
        if request.deployment_name:  # the client itself, which is installed here anyway
            return api_pb2.MountGetOrCreateResponse(mount_id="mo-client")
        mount_id = self._state.new_id("mo")
        self._state.mounts[mount_id] = list(request.files)
        metadata = api_pb2.MountHandleMetadata(content_checksum_sha256_hex=mount_id)
        return api_pb2.MountGetOrCreateResponse(mount_id=mount_id, handle_metadata=metadata)

    # Volumes

    async def volume_get_or_create(self, request):
        name = request.deployment_name
        volume_id = f"vo-{name}"
        folder = self._state.volume(volume_id)
        if request.object_creation_type != api_pb2.OBJECT_CREATION_TYPE_UNSPECIFIED:
            folder.mkdir(parents=True, exist_ok=True)
        elif not folder.exists():
            raise GRPCError(Status.NOT_FOUND, f"Volume '{name}' not found in environment 'main'")
        version = api_pb2.VOLUME_FS_VERSION_V1
        metadata = api_pb2.VolumeMetadata(name=name, version=version)
        return api_pb2.VolumeGetOrCreateResponse(
            volume_id=volume_id, version=version, metadata=metadata
        )

    async def volume_heartbeat(self, request):
        return Empty()

    async def volume_commit(self, request):
        return api_pb2.VolumeCommitResponse(skip_reload=True)

    async def volume_reload(self, request):
        return Empty()

    async def volume_put_files(self, request):
        for file in request.files:
            target = self._path(request.volume_id, file.filename)
            if request.disallow_overwrite_existing_files and target.exists():
                raise GRPCError(Status.ALREADY_EXISTS, f"{file.filename}: already exists")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._state.content(file.sha256_hex), target)
        return Empty()

    async def volume_list_files(self, request):
        top = self._existing_path(request.volume_id, request.path)
        found = sorted(top.rglob("*") if request.recursive else top.iterdir())
        entries = [
            api_pb2.FileEntry(
                path=path.relative_to(self._state.volume(request.volume_id)).as_posix(),
                type=api_pb2.FileEntry.DIRECTORY if path.is_dir() else api_pb2.FileEntry.FILE,
                mtime=int(path.stat().st_mtime),
                size=path.stat().st_size,
            )
            for path in found
        ]
        yield api_pb2.VolumeListFilesResponse(entries=entries)

    async def volume_get_file2(self, request):
        path = self._existing_path(request.volume_id, request.path)
        size = path.stat().st_size
        name = path.relative_to(self._state.volume(request.volume_id)).as_posix()
        url = f"{self._state.http_url}/volumes/{request.volume_id}"
        urls = [f"{url}/{start}/{name}" for start in range(0, size, BLOCK)]
        return api_pb2.VolumeGetFile2Response(get_urls=urls, size=size, start=0, len=size)

    async def volume_remove_file(self, request):
        path = self._existing_path(request.volume_id, request.path)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        return Empty()

    def _path(self, volume_id: str, name: str) -> Path:
        parts = PurePosixPath("/", name).parts[1:]
        if ".." in parts:
            raise GRPCError(Status.INVALID_ARGUMENT, f"invalid path {name!r}")
        return self._state.volume(volume_id).joinpath(*parts)

    def _existing_path(self, volume_id: str, name: str) -> Path:
        path = self._path(volume_id, name)
        if not path.exists():
            raise GRPCError(Status.NOT_FOUND, f"{name}: No such file or directory")
        return path

    # HTTP

    def http_app(self) -> web.Application:
        """Returns the routes that the URLs above lead to."""
        app = web.Application()
        app.router.add_put("/contents/{key}", self._put_content)
        app.router.add_get("/volumes/{id}/{start}/{path:.+}", self._get_block)
        return app

    async def _put_content(self, request: web.Request) -> web.Response:
        digest = hashlib.md5(usedforsecurity=False)
        with self._state.content(request.match_info["key"]).open("wb") as file:
            async for block in request.content.iter_chunked(1 << 20):
                digest.update(block)
                file.write(block)
        return web.Response(headers={"ETag": f'"{digest.hexdigest()}"'})

    async def _get_block(self, request: web.Request) -> web.Response:
        where = request.match_info
        with self._path(where["id"], where["path"]).open("rb") as file:
            file.seek(int(where["start"]))
            return web.Response(body=file.read(BLOCK))
