"""The three stages of a migration for a host whose machines are raw images in a folder: `raw:/images/web.raw` becomes
POOL/web-disk0.raw and a description of the machine. It goes through everything a real service has to do, with nothing to
install: sources stay untouched, files get their names when they are complete, a repetition finds what is done.
"""

import hashlib
import os
import pathlib
import re
import shutil
import time
import uuid

from google.protobuf import json_format

import flotilla_bus as bus
from flotilla_bus import StatusError

CHUNK = 1 << 20
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class RawImages:
    def __init__(self, host, arguments, protocol):
        self.host, self.pools, self.sources, self.rate = host, arguments.pool, arguments.sources, arguments.rate << 20
        self.domains = pathlib.Path(arguments.state, "domains")
        self.domains.mkdir(exist_ok=True)
        self.manifest, self.profile = protocol["manifest"], protocol["host"]
        self.pb = protocol["export"], protocol["convert"], protocol["deploy"]
        self.task_pb = protocol["task"]
        export, convert, deploy = self.pb
        # By property `type`: the request, and a generator of updates whose last one is the result.
        self.methods = {
            "/flotilla.v1.ExportService/Export": (export.ExportRequest, self.export),
            "/flotilla.v1.ConvertService/Convert": (convert.ConvertRequest, self.convert),
            "/flotilla.v1.DeployService/Deploy": (deploy.DeployRequest, self.deploy),
        }

    def inventory(self):
        profile = self.profile.HostProfile(
            name=self.host, hypervisor="files", domain_type="test", domain_type_reason="it only keeps files",
            cpus=os.cpu_count(), memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            kernel=os.uname().release)
        profile.captured_at.GetCurrentTime()
        for name, path in self.pools.items():
            usage = os.statvfs(path)
            profile.pools.add(
                name=name, path=os.path.abspath(path), free_bytes=usage.f_bavail * usage.f_frsize,
                writable=os.access(path, os.W_OK), problem="" if os.access(path, os.W_OK) else "it is read-only")
        for path in sorted(self.domains.glob("*.json")):
            manifest = self.read(path).manifest
            profile.domains.add(name=path.stem, uuid=self.uuid(manifest), migration_id=manifest.migration_id)
        return profile

    # Export

    def export(self, request, attempt):
        path = self.source_path(request.source_url)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-.") or "vm"
        status = path.stat()
        manifest = self.manifest.Manifest(
            schema_version=1, migration_id=request.migration_id, created_by="flotilla example worker")
        manifest.captured_at.GetCurrentTime()
        manifest.source.url, manifest.source.path = request.source_url, str(path)
        manifest.source.fingerprint = self.fingerprint(path)
        manifest.vm.name = name
        manifest.vm.firmware, manifest.vm.power_state = self.manifest.BIOS, self.manifest.POWERED_OFF
        manifest.vm.cpu.count = manifest.vm.cpu.cores_per_socket = 1
        manifest.vm.memory.bytes = 512 << 20
        disk = manifest.disks.add(
            id="disk0", capacity_bytes=status.st_size, controller=self.manifest.SATA, mode="persistent", boot=True)
        disk.source.path, disk.source.length, disk.source.format = str(path), status.st_size, "raw"
        yield self.pb[0].ExportUpdate(result={"manifest": manifest})

    def source_path(self, url):
        """Nothing in a message can name a file outside the folders that this worker was started with."""
        if not url.startswith("raw:/"):
            raise StatusError(bus.INVALID_ARGUMENT, f"{url} is not raw:/PATH", "this host takes raw images alone")
        path = pathlib.Path(url.removeprefix("raw:")).resolve()
        if not any(path.is_relative_to(folder) for folder in self.sources):
            raise StatusError(bus.PERMISSION_DENIED, f"{path} lies in none of the host's source folders")
        if not path.is_file():
            raise StatusError(bus.NOT_FOUND, f"there is no file {path}")
        return path

    @staticmethod
    def fingerprint(path):
        status = path.stat()
        return hashlib.sha256(f"{path} {status.st_ino} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()

    # Convert

    def convert(self, request, attempt):
        if request.format != "raw":
            raise StatusError(bus.INVALID_ARGUMENT, f"this host makes no {request.format} images", "ask for format raw")
        pool = self.pools.get(request.pool)
        if pool is None:
            raise StatusError(bus.FAILED_PRECONDITION, f"host {self.host} has no pool {request.pool}")
        self.require_name(request.domain_name)
        source = self.source_path(request.manifest.source.url)
        folder = self.work_folder(pool, attempt)
        result = self.pb[1].ConvertResult(disks=request.manifest.disks)
        made = []
        for disk in result.disks:
            self.require_name(disk.id)
            new = folder / f"{disk.id}.raw"
            yield from self.copy(source, new, disk, attempt)
            made.append((new, pathlib.Path(pool, f"{request.domain_name}-{disk.id}.raw"), disk))
        if self.fingerprint(source) != request.manifest.source.fingerprint:
            raise StatusError(bus.FAILED_PRECONDITION, f"{source} changed while it was copied", "submit it again")
        attempt.permit("publish-disks")
        for new, path, disk in made:
            self.publish(new, path, disk)
            disk.target.path, disk.target.format = str(path.resolve()), "raw"
            disk.target.allocated_bytes = path.stat().st_blocks * 512
            yield self.pb[1].ConvertUpdate(step={"subject": disk.id, "message": f"written to {path}"})
        yield self.pb[1].ConvertUpdate(result=result)

    def work_folder(self, pool, attempt):
        """POOL/.flotilla/TASK/FENCE. What an older attempt left there is of no use: this service starts over."""
        shutil.rmtree(pathlib.Path(pool, ".flotilla", attempt.task), ignore_errors=True)
        folder = pathlib.Path(pool, ".flotilla", attempt.task, str(attempt.fence))
        folder.mkdir(parents=True, mode=0o700)
        return folder

    def copy(self, source, new, disk, attempt):
        """Leaves holes where the source is zero, and takes the digests on the way."""
        whole, chunks, done, started = hashlib.sha256(), hashlib.sha256(), 0, time.monotonic()
        told = started
        with open(source, "rb") as reader, open(new, "xb") as writer:
            while chunk := reader.read(CHUNK):
                attempt.check()
                whole.update(chunk)
                chunks.update(hashlib.sha256(chunk).digest())
                if chunk.count(0) == len(chunk):
                    writer.seek(len(chunk), os.SEEK_CUR)
                else:
                    writer.write(chunk)
                done += len(chunk)
                if self.rate:
                    time.sleep(max(0, done / self.rate - (time.monotonic() - started)))
                if time.monotonic() - told > 0.5:
                    told = time.monotonic()
                    yield self.pb[1].ConvertUpdate(progress=self.task_pb.TaskProgress(
                        subject=disk.id, phase="converting", bytes_done=done, bytes_total=disk.capacity_bytes))
            writer.truncate(done)
            writer.flush()
            os.fsync(writer.fileno())
        disk.source.sha256, disk.source.stream_bytes = whole.hexdigest(), done
        disk.source.content_sha256, disk.source.content_chunk_bytes = chunks.hexdigest(), CHUNK

    def publish(self, new, path, disk):
        """Gives a complete file its name, but never one that is taken, except by the same content: then an earlier
        attempt got as far as this."""
        try:
            os.link(new, path)
        except FileExistsError:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != disk.source.sha256:
                    raise StatusError(
                        bus.ALREADY_EXISTS, f"{path} is there already and is not this disk",
                        "move it away, or choose another name") from None
        self.synchronize(path.parent)

    def sweep(self, task):
        """What a task whose end is stored left besides its result."""
        for pool in self.pools.values():
            shutil.rmtree(pathlib.Path(pool, ".flotilla", task), ignore_errors=True)

    # Deploy

    def deploy(self, request, attempt):
        name, manifest, mode = request.options.domain_name, request.manifest, request.mode
        self.require_name(name)
        dry_run, check = (getattr(self.pb[2], mode) for mode in ("DRY_RUN", "CHECK"))
        result = self.pb[2].DeployResult(
            domain_name=name, domain_uuid=self.uuid(manifest), domain_state="shut off",
            manifest_sha256=hashlib.sha256(manifest.SerializeToString(deterministic=True)).hexdigest())
        path = self.domains / f"{name}.json"
        if path.exists() and self.read(path).manifest.migration_id != manifest.migration_id:
            raise StatusError(bus.ALREADY_EXISTS, f"there is a machine {name} of another migration already")
        if mode == check and not path.exists():
            raise StatusError(bus.NOT_FOUND, f"the machine {name} is gone")
        if mode == dry_run:
            result.domain_xml = f"<!-- {path} would be written -->"
        else:
            for disk in manifest.disks:
                if not os.path.isfile(disk.target.path):
                    raise StatusError(bus.NOT_FOUND, f"{name}: its disk {disk.target.path} is gone")
            if mode != check:
                attempt.permit("define-domain")
                self.define(path, request)
        yield self.pb[2].DeployUpdate(result=result)

    def define(self, path, request):
        if path.exists():
            return
        new = path.with_suffix(".new")
        with open(new, "w") as file:
            file.write(json_format.MessageToJson(request))
            file.flush()
            os.fsync(file.fileno())
        os.link(new, path)
        new.unlink()
        self.synchronize(path.parent)

    def read(self, path):
        return json_format.Parse(path.read_text(), self.pb[2].DeployRequest())

    @staticmethod
    def uuid(manifest):
        """The same for every attempt."""
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"flotilla:{manifest.migration_id}"))

    @staticmethod
    def require_name(name):
        if not NAME.fullmatch(name):
            raise StatusError(bus.INVALID_ARGUMENT, f"{name!r} can't name a file")

    @staticmethod
    def synchronize(folder):
        descriptor = os.open(folder, os.O_DIRECTORY)
        os.fsync(descriptor)
        os.close(descriptor)
