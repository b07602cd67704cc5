"""Functions with real distributions, in real enclaves: everything that runs comes from measured pages."""

from __future__ import annotations

import datetime
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import xxhash
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from enturbo import EnclaveImage, HandlerError, MeasurementMismatch, Runtime, SigningKey
from enturbo.runtime.distributions import find

WAIT = 60.0

FUNCTION = """
import sys
import xxhash, msgpack, numpy
import numpy.linalg
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

def handler(event, context):
    key = bytes(range(32))
    sealed = AESGCM(key).encrypt(bytes(12), event["text"], None)
    solved = numpy.linalg.solve(numpy.array([[3.0, 1.0], [1.0, 2.0]]), numpy.array([9.0, 8.0]))
    files = [sys.modules[name].__file__ for name in ("xxhash._xxhash", "msgpack._cmsgpack", "numpy")]
    try:  # a sealed process may not
        with open("/proc/self/maps") as maps:
            where = [line.split()[-1] for line in maps if "site-packages" in line]
    except PermissionError:
        where = []
    return {
        "digest": xxhash.xxh3_64_hexdigest(event["text"]),
        "packed": msgpack.packb([1, "zwei"]),
        "opened": AESGCM(key).decrypt(bytes(12), sealed, None),
        "solved": [round(float(each), 9) for each in solved],
        "files": files,
        "host files": sorted({path for path in where if path.startswith("/")
                              and not path.startswith("/memfd:") and "msgpack" not in path}),
    }
"""


@pytest.fixture(scope="module", params=["kernel", "cooperative"])
def runtime(request: pytest.FixtureRequest, key: SigningKey) -> Iterator[Runtime]:
    with Runtime(epc="512MiB", signers=[key.mrsigner], enforcement=request.param) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> EnclaveImage:
    folder = tmp_path_factory.mktemp("function")
    (folder / "handler.py").write_text(FUNCTION)
    return EnclaveImage.from_function(
        folder,
        heap="1MiB",
        requirements=["xxhash", "msgpack", "numpy", "cryptography"],
        exclude=["*/tests/*"],
    )


def check(result: Any) -> None:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert result["digest"] == xxhash.xxh3_64_hexdigest(b"measured")
    assert result["packed"] == b"\x92\x01\xa4zwei"
    assert result["opened"] == b"measured"
    assert result["solved"] == [2.0, 3.0]
    assert result["files"] == [
        f"/enclave/site-packages/xxhash/_xxhash{suffix}",
        f"/enclave/site-packages/msgpack/_cmsgpack{suffix}",
        "/enclave/site-packages/numpy/__init__.py",
    ]
    assert result["host files"] == []


@pytest.mark.parametrize("scheme", ["enturbo", "sgx"])
@pytest.mark.parametrize("startup", ["enturbo", "serial"])
def test_real_libraries_work(
    runtime: Runtime, image: EnclaveImage, key: SigningKey, startup: str, scheme: str
) -> None:
    """msgpack is the platform's, too, and was imported long before; the handler gets the image's own one."""
    used = image.as_edmm() if scheme == "sgx" else image
    with runtime.launch(used, key.sign(used, scheme=scheme), startup=startup) as enclave:
        check(enclave.submit({"text": b"measured"}).result(WAIT))
        check(enclave.submit({"text": b"measured"}).result(WAIT))
        assert enclave.state == "VERIFIED"


@pytest.mark.parametrize("label", ["numpy", "numpy, native code"])
def test_one_changed_byte_is_rejected(
    runtime: Runtime, image: EnclaveImage, key: SigningKey, label: str
) -> None:
    """In Python that never runs, or in native code: nothing that the function says gets out."""
    sigstruct = key.sign(image)
    name, _, rest = label.partition(",")
    regions = list(image.regions)
    number = next(
        number
        for number, region in enumerate(regions)
        if region.label.startswith(f"{name} ") and region.label.endswith(rest)
    )
    content = bytearray(regions[number].content or b"")
    content[-5000] ^= 1
    regions[number] = replace(regions[number], content=bytes(content), file_page=None, layer=None)
    tampered = EnclaveImage(regions, size=image.size, backing=image.backing)
    with runtime.launch(tampered, sigstruct) as enclave:
        future = enclave.submit({"text": b"measured"})
        with pytest.raises(MeasurementMismatch):
            future.result(WAIT)
        assert enclave.state == "REJECTED"


@pytest.mark.parametrize("name", ["xxhash", "numpy", "psutil", "pytest"])
def test_what_the_image_lacks_cannot_be_imported(
    cooperative: Runtime, function: Callable[..., Path], name: str
) -> None:
    """Though the host has it."""
    __import__(name)
    folder = function(f"import {name}\ndef handler(event, context): return {name}.__file__\n")
    image = EnclaveImage.from_function(folder, heap=0, requirements=["msgpack"])
    with cooperative.launch(image, allow_unsigned=True) as enclave, pytest.raises(HandlerError) as caught:
        enclave.submit(None).result(WAIT)
    assert f"ModuleNotFoundError: No module named '{name}'" in str(caught.value)


def test_a_part_that_is_left_out_is_missed(cooperative: Runtime, function: Callable[..., Path]) -> None:
    folder = function("import msgpack._cmsgpack\ndef handler(event, context): pass\n")
    image = EnclaveImage.from_function(folder, heap=0, requirements=["msgpack"], exclude=["_cmsgpack*"])
    with cooperative.launch(image, allow_unsigned=True) as enclave, pytest.raises(HandlerError) as caught:
        enclave.submit(None).result(WAIT)
    assert "No module named 'msgpack._cmsgpack'" in str(caught.value)


def test_a_functions_own_native_module(cooperative: Runtime, function: Callable[..., Path]) -> None:
    """And libraries that ctypes loads, by the path that the image has them at."""
    (xxhash,) = find(["xxhash"])
    native = next(file for file in xxhash.files if file.name.endswith(".so"))
    folder = function(
        "import ctypes, os\n"
        "import _xxhash\n"
        "def handler(event, context):\n"
        "    library = ctypes.CDLL(_xxhash.__file__)\n"
        "    return [_xxhash.xxh32_hexdigest(b''), hasattr(library, 'PyInit__xxhash'), _xxhash.__file__]\n"
    )
    (folder / native.path.name).write_bytes(native.read())
    image = EnclaveImage.from_function(folder, heap=0)
    with cooperative.launch(image, allow_unsigned=True) as enclave:
        digest, has, path = enclave.submit(None).result(WAIT)
    assert (digest, has, path) == ("02cc5d05", True, f"/enclave/{native.path.name}")


def test_metadata_and_resources_of_distributions(cooperative: Runtime, function: Callable[..., Path]) -> None:
    folder = function(
        "import importlib.metadata, importlib.resources, pkgutil\n"
        "import rich\n"
        "def handler(event, context):\n"
        "    return [importlib.metadata.version('rich'),\n"
        "            sorted(each.metadata['Name'].lower() for each in importlib.metadata.distributions()),\n"
        "            (importlib.resources.files('rich') / 'py.typed').read_bytes(),\n"
        "            len(list(pkgutil.walk_packages(rich.__path__, 'rich.'))) > 50]\n"
    )
    image = EnclaveImage.from_function(folder, heap=0, requirements=["rich"])
    with cooperative.launch(image, allow_unsigned=True) as enclave:
        version, names, typed, walked = enclave.submit(None).result(WAIT)
    (rich,) = [each for each in find(["rich"]) if each.name.lower() == "rich"]
    assert (version, typed, walked) == (rich.version, b"", True)
    assert names == sorted(each.name.lower() for each in find(["rich"]))


def test_libraries_that_need_each_other(
    runtime: Runtime, key: SigningKey, function: Callable[..., Path]
) -> None:
    """Pillow's FreeType and HarfBuzz do."""
    folder = function(
        "from PIL import ImageFont, features\n"
        "def handler(event, context):\n"
        "    return [features.check(name) for name in ('freetype2', 'webp')]\n"
    )
    image = EnclaveImage.from_function(folder, heap=0, requirements=["Pillow"])
    with runtime.launch(image, key.sign(image)) as enclave:
        assert enclave.submit(None).result(WAIT) == [True, True]


def test_certificates_of_the_image(runtime: Runtime, key: SigningKey, function: Callable[..., Path]) -> None:
    """OpenSSL opens them by path."""
    folder = function(
        "import ssl\n"
        "def handler(event, context):\n"
        "    named, given = (ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) for _ in range(2))\n"
        "    named.load_verify_locations(cafile='/enclave/ca.pem')\n"
        "    given.load_verify_locations('/enclave/ca.pem')\n"
        "    try:\n"
        "        ssl.create_default_context(cafile='/enclave/none.pem')\n"
        "    except FileNotFoundError as error:\n"
        "        return [len(named.get_ca_certs()), len(given.get_ca_certs()), error.filename]\n"
    )
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority")])
    begin = datetime.datetime(2024, 1, 1)
    builder = x509.CertificateBuilder(name, name, private.public_key(), 1, begin, begin.replace(year=2124))
    builder = builder.add_extension(x509.BasicConstraints(True, None), critical=True)
    authority = builder.sign(private, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    image = EnclaveImage.from_function(folder, heap=0, files={"ca.pem": authority})
    with runtime.launch(image, key.sign(image)) as enclave:
        assert enclave.submit(None).result(WAIT) == [1, 1, "/enclave/none.pem"]
