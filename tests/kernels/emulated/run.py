"""Boot the check of the kernels on an emulated machine with AVX512 and AMX; see the README beside this."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(ROOT / "src" / "sfumato" / "kernels"))
# Without these the kernel copies with string instructions, which this machine gets wrong, and waits for its clocks.
OPTIONS = (
    "console=ttyS0 mitigations=off nokaslr panic=-1 tsc=reliable lpj=4000000 nowatchdog loglevel=3 no5lvl "
    "clearcpuid=297,580,112 nohpet idle=poll apparmor=0 selinux=0"
)
MACHINE = """megs: 512
cpu: model=sapphire_rapids, count=1, ips=20000000, reset_on_triple_fault=0
romimage: file={share}/bochs/BIOS-bochs-latest
vgaromimage: file={share}/vgabios/vgabios-stdvga.bin
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path={out}/test.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={out}/serial.txt
clock: sync=none
display_library: nogui
log: {out}/bochs.log
panic: action=fatal
error: action=report
info: action=ignore
debug: action=ignore
"""


def program(out: Path) -> Path:
    """The check with every kernel, as one file that needs no libraries."""
    import build  # of the kernels, which imports nothing of the package

    objects = []
    have = [f"-DHAVE_{isa.upper()}" for isa in build.ISAS]
    jobs = [((), "library", "library", ['-DMARK="emulated"', *have])]
    for isa, (names, flags, width, rows) in build.ISAS.items():
        macros = [f"-DWIDTH={width}", f"-DROWS={rows}"]
        jobs += [(flags, name, f"{name}_{isa}", [*macros, f"-DKERNEL={name}_{isa}"]) for name in names]
    for flags, name, made, macros in jobs:
        objects.append(out / f"{made}.o")
        source = build.SOURCES / f"{name}.cpp"
        run("g++", *build.FLAGS, *flags, *macros, "-c", source, "-o", objects[-1])
    run("g++", "-std=c++17", "-O2", f"-I{build.SOURCES}", HERE / "check.cpp", *objects, "-static", "-pthread", "-o",
        out / "check")  # fmt: skip
    return out / "check"


def disc(out: Path, init: Path, kernel: Path, share: Path) -> None:
    """A disc that boots the kernel with `init` as its first program."""
    tree, iso = out / "tree", out / "iso"
    for folder in (tree, iso):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    shutil.copy(init, tree / "init")
    os.chmod(tree / "init", 0o755)
    (tree / "dev").mkdir()
    names = b".\ninit\ndev\n"
    packed = subprocess.run(
        ["cpio", "--quiet", "-o", "-H", "newc"], input=names, stdout=subprocess.PIPE, cwd=tree, check=True
    )
    (iso / "initrd").write_bytes(packed.stdout)
    shutil.copy(kernel, iso / "vmlinuz")
    lib = share.parent / "lib"
    shutil.copy(lib / "ISOLINUX" / "isolinux.bin", iso)
    shutil.copy(lib / "syslinux" / "modules" / "bios" / "ldlinux.c32", iso)
    (iso / "isolinux.cfg").write_text(f"DEFAULT l\nPROMPT 0\nLABEL l\nKERNEL vmlinuz\nAPPEND initrd=initrd {OPTIONS}\n")
    run("genisoimage", "-quiet", "-o", out / "test.iso", "-b", "isolinux.bin", "-c", "boot.cat", "-no-emul-boot",
        "-boot-load-size", "4", "-boot-info-table", iso)  # fmt: skip


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bochs", default="bochs", help="the emulator, with its options")
    parser.add_argument("--kernel", type=Path, required=True, help="a Linux kernel, as /boot/vmlinuz")
    parser.add_argument("--share", type=Path, default=Path("/usr/share"), help="where bochs/ and vgabios/ are")
    parser.add_argument("--out", type=Path, required=True, help="folder to work in")
    asked = parser.parse_args()
    out = asked.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    disc(out, program(out), asked.kernel, asked.share)
    (out / "bochsrc").write_text(MACHINE.format(share=asked.share.resolve(), out=out))
    (out / "serial.txt").unlink(missing_ok=True)
    subprocess.run([*shlex.split(asked.bochs), "-q", "-f", str(out / "bochsrc")], cwd=out, stdout=subprocess.DEVNULL)
    said = (out / "serial.txt").read_text(errors="replace")
    print(said)
    sys.exit(0 if "all right" in said else 1)


if __name__ == "__main__":
    main()
