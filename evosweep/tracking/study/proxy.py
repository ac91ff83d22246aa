"""Optuna storage behind Optuna's gRPC proxy, for workers that cannot reach the database itself."""

from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import BaseStorage

from evosweep.core.checks import check_choice, check_int, check_number
from evosweep.core.errors import SettingError
from evosweep.tracking.study.storage import RECORD, open_artifacts

PORTS = 65535


class Proxy:
    """A gRPC proxy, as ``optuna.storages.run_grpc_proxy_server`` runs it; wants ``pip install grpcio protobuf``.

    Args:
        host: Of the proxy.
        port: It listens on.
        record: What becomes a parameter of a trial, as in ``storage.Journal``.
        artifacts: Folder for the elites' pictures; null keeps none.
        timeout: Seconds to wait for its first answer.

    Raises:
        SettingError: A setting cannot be used, or (by ``open``) no proxy answers.
    """

    repaired = ""

    def __init__(
        self,
        *,
        host: str,
        port: int = 13000,
        record: str = "compact",
        artifacts: str | None = None,
        timeout: float = 10.0,
    ) -> None:
        if not isinstance(host, str) or not host:
            raise SettingError("host", allowed="the name or address of a host", got=host)
        self.host = host
        self.port = check_int("port", port, low=1, high=PORTS)
        self.record = check_choice("record", record, RECORD)
        self.artifacts = artifacts
        self.timeout = check_number("timeout", timeout, low=0, exclusive=True)

    def open(self) -> BaseStorage:
        """Return the storage."""
        try:
            from optuna.storages import GrpcStorageProxy  # noqa: PLC0415 - loads grpc, which is optional

            storage = GrpcStorageProxy(host=self.host, port=self.port)
            storage.wait_server_ready(timeout=self.timeout)
        except ImportError as error:
            raise SettingError(
                "host", owner=self, allowed="left out without gRPC", got=self.host, hint="pip install grpcio protobuf"
            ) from error
        except ConnectionError as error:
            raise SettingError(
                "host",
                owner=self,
                allowed="the host of a gRPC proxy that answers",
                got=f"{self.host}:{self.port}",
                hint=f"nothing did within {self.timeout:g} s",
            ) from error
        return storage

    def artifact_store(self) -> FileSystemArtifactStore | None:
        """Return the store of pictures, its folder made if it is not there; None if none are kept."""
        return open_artifacts(self.artifacts, owner=self)
