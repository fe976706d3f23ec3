"""Hostile programs, each under four conditions: as root and as an ordinary user, where namespaces are allowed, and
where they are forbidden."""
import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from worlds import sandbox

pytestmark = pytest.mark.usefixtures("alone")

HARNESS = '''
import ctypes, json, os, socket, struct, subprocess, sys, threading, time
user, apart, folder = int(sys.argv[1]), sys.argv[2] == "True", sys.argv[3]
if user:
    os.setgroups([]); os.setresgid(user, user, user); os.setresuid(user, user, user)
libc = ctypes.CDLL(None)
if not apart:                                   # as in a container: unshare is refused, for us and all below
    nr = 272 if os.uname().machine == "x86_64" else 97
    code = b"".join(struct.pack("=HBBI", *i) for i in [
        (0x20, 0, 0, 0), (0x15, 0, 1, nr), (6, 0, 0, 0x50001), (6, 0, 0, 0x7fff0000)])
    kept = ctypes.create_string_buffer(code, len(code))
    libc.prctl(38, 1, 0, 0, 0)
    assert libc.prctl(22, 2, struct.pack("@HP", 4, ctypes.addressof(kept)), 0, 0) == 0
sys.path.insert(0, folder)
from worlds.sandbox import Limits, run
os.environ["SECRET"] = "swordfish"
victim = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
open(folder + f"/mine-{user}-{apart}", "w").write("swordfish")
server = socket.create_server(("127.0.0.1", 0)); met = []
def accept():
    while True: met.append(server.accept())
threading.Thread(target=accept, daemon=True).start()
post = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
post.bind(folder + f"/mine-{user}-{apart}-socket-{os.getpid()}")
heard = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); heard.bind(("127.0.0.1", 0)); heard.setblocking(False)
post.setblocking(False)
about = dict(pid=os.getpid(), victim=victim.pid, file=folder + f"/mine-{user}-{apart}", port=server.getsockname()[1],
             udp=heard.getsockname()[1], user=user)
os.chmod(about["file"], 0o644)
def left():
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try: text = open(f"/proc/{pid}/cmdline").read()
        except OSError: continue
        if "main.py" in text.split(chr(0))[-2:] or "launcher.py" in text: found.append(pid)
    return found
for line in sys.stdin:
    job = json.loads(line)
    before = set(os.listdir("/tmp"))
    began = time.monotonic()
    result = run("ABOUT = %r\\n" % about + job["source"], job.get("stdin", ""), Limits(**job["limits"]))
    took = time.monotonic() - began
    for ear in (heard, post):
        try: ear.recv(10); met.append("a message")
        except BlockingIOError: pass
    folders = [name for name in set(os.listdir("/tmp")) - before if name.startswith("leafe-")]
    print(json.dumps(dict(vars(result), took=took, left=left(), victim=victim.poll(), met=len(met), folders=folders,
                          file=open(about["file"]).read(), mode=os.stat(about["file"]).st_mode & 0o777)), flush=True)
victim.kill()
'''


class Harness:
    def __init__(self, root: bool, apart: bool, folder, **env):
        (folder / "worlds").mkdir(exist_ok=True)
        for name in ("__init__.py", "sandbox.py", "launcher.py"):
            shutil.copy(ROOT / "worlds" / name, folder / "worlds")
        (folder / "harness.py").write_text(HARNESS)
        os.chmod(folder, 0o777)
        user = 0 if root or os.geteuid() else 65534
        python = sys.executable if root or os.geteuid() else "/usr/bin/python3"
        self.folder, self.again = folder, lambda **env: Harness(root, apart, folder, **env)
        self.process = subprocess.Popen(
            [python, "-S", str(folder / "harness.py"), str(user), str(apart), str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **env})

    def __call__(self, source, stdin="", **limits):
        limits = dict(dict(seconds=2, memory_mb=256), **limits)
        self.process.stdin.write(json.dumps(dict(source=source, stdin=stdin, limits=limits)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        found = json.loads(line)
        assert "ESCAPED" not in found["out"], found
        assert found["left"] == [] and found["folders"] == [], found          # no process, no folder
        assert found["victim"] is None and found["met"] == 0, found          # nobody was shot, nobody was called
        assert (found["file"], found["mode"]) == ("swordfish", 0o644)
        assert found["took"] < limits["seconds"] + 4
        return found


def test_root_of_a_container_with_few_users_is_told_so(monkeypatch):
    def chown(*_):
        raise OSError(22, "Invalid argument")
    monkeypatch.setattr(sandbox.os, "geteuid", lambda: 0)
    monkeypatch.setattr(sandbox.os, "chown", chown)
    with pytest.raises(sandbox.SandboxError, match="this system gives it none .Invalid argument.; run as an ordinary user"):
        sandbox.run("print(1)", "", sandbox.Limits())


@pytest.fixture(scope="module", params=[(True, True), (True, False), (False, True), (False, False)],
                ids=["root", "root-without-namespaces", "user", "user-without-namespaces"])
def hold(request, tmp_path_factory):
    root, apart = request.param
    if root and os.geteuid():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs root")
    folder = tmp_path_factory.mktemp("sandbox")
    for path in [folder, *folder.parents]:
        if path != path.parent and os.stat(path).st_uid == os.geteuid() and str(path) != "/tmp":
            os.chmod(path, 0o777)
    harness = Harness(root, apart, folder)
    yield harness
    harness.process.stdin.close()
    errors = harness.process.stderr.read()
    assert harness.process.wait(30) == 0, errors
    assert errors.count("namespaces are forbidden here") == (not apart)       # said once


def test_a_program_reads_its_input_and_answers(hold):
    found = hold("print(input()[::-1]); import sys; print('no', file=sys.stderr); sys.exit(3)", "hello")
    assert (found["out"], found["err"], found["code"], found["end"]) == ("olleh\n", "no\n", 3, "exit")


def test_a_traceback_names_no_random_folder(hold):
    assert 'File "main.py", line 2, in <module>' in hold("1/0")["err"]


def test_the_same_program_prints_the_same_again(hold):
    source = "import os; print({'a', 'b', 'c', 'd'}, os.environ, os.getcwd(), object())"      # hashes and addresses, too
    assert len({hold(source)["out"] for _ in range(3)}) == 1


def test_under_root_every_program_has_a_user_of_its_own(hold, request):
    users = [int(hold("import os; print(os.getuid())")["out"]) for _ in range(2)]
    if request.node.callspec.id.startswith("root"):
        assert len({*users}) == 2 and min(users) >= 10**8
    else:
        assert users == [os.geteuid() or 65534] * 2


@pytest.mark.parametrize("source", [
    "import os\nwhile 1:\n try: os.fork()\n except OSError: pass",                                # fork bomb
    "import time; time.sleep(600)",
    "while 1: pass",
    "import signal, time\nfor s in range(1, 65):\n try: signal.signal(s, signal.SIG_IGN)\n"
    " except (OSError, ValueError): pass\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\n"
    "while 1: pass",                                                                             # ignored signals
    "import os\nos.closerange(0, 256)\nwhile 1: pass",                                           # closed descriptors
    "import os\nfor _ in range(8):\n if os.fork() == 0: break\nwhile 1: pass",                   # CPU bomb
    "import os, time\nos.fork()\nos.setsid() if os.getpid() != os.getsid(0) else None\nos.fork()\ntime.sleep(600)",
], ids=["fork-bomb", "sleep", "spin", "ignored-signals", "closed-descriptors", "cpu-bomb", "sessions"])
def test_what_does_not_end_is_ended(hold, source):
    found = hold(source, seconds=1)
    assert (found["end"], found["code"]) == ("time", -9)


def test_a_daemon_does_not_outlive_its_program(hold):
    found = hold("import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n  os.closerange(0, 9)\n"
                 "  time.sleep(600)\n os._exit(0)\nos.wait(); print('done')")
    assert (found["out"], found["code"], found["end"]) == ("done\n", 0, "exit")


def test_zombies_are_few_and_go(hold):
    found = hold("import os\nn = 0\ntry:\n while n < 500:\n  if os.fork() == 0: os._exit(0)\n  n += 1\n"
                 "except OSError: pass\nprint(n)")
    assert 0 < int(found["out"]) <= 16


def test_memory_is_bounded_for_one_process_and_for_all_together(hold):
    assert "MemoryError" in hold("x = bytearray(10**10)")["err"]
    assert "MemoryError" in hold("x = []\nwhile 1: x.append(bytearray(10**6))")["err"]
    found = hold("import os, time\nfor _ in range(6):\n if os.fork() == 0: break\nx = bytearray(b'a') * 10**8\n"
                 "time.sleep(600)", seconds=10)
    assert found["end"] == "memory" and found["took"] < 8


def test_memory_that_no_process_would_count_is_not_given(hold):
    found = hold("import mmap, os, time\nheld = []\nfor _ in range(18):\n held.append(mmap.mmap(-1, 10**8))\n"
                 " if os.fork() == 0:\n  held[-1].write(bytes(10**8)); os._exit(0)\n os.wait()\nprint('held')")
    assert "PermissionError" in found["err"] and "held\n" not in found["out"]
    own = "import mmap\nprint(len(mmap.mmap(-1, 10**6, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)))"
    assert hold(own)["out"] == "1000000\n"


@pytest.mark.parametrize("flags", ["MAP_SHARED", "MAP_PRIVATE"])
def test_files_that_it_removed_and_closed_but_has_mapped_are_over_the_limit(hold, flags):
    found = hold("import mmap, os, time\nheld = []\nfor _ in range(30):\n with open('a', 'wb+') as f:\n"
                 f"  f.write(bytes(10**7)); f.flush()\n  held.append(mmap.mmap(f.fileno(), 4096, flags=mmap.{flags}))\n"
                 " os.unlink('a')\ntime.sleep(600)", seconds=5)
    assert found["end"] == "disk"


def test_a_process_whose_first_thread_ended_alone_hides_nothing(hold):
    found = hold("import ctypes, os, threading, time\ndef work():\n b = bytearray(b'a') * (150 << 20)\n time.sleep(600)\n"
                 "for _ in range(2):\n if os.fork() == 0: break\nthreading.Thread(target=work).start()\n"
                 "ctypes.CDLL(None).syscall(60 if os.uname().machine == 'x86_64' else 93, 0)", memory_mb=256, seconds=10)
    assert found["end"] == "memory" and found["took"] < 8
    assert hold("import threading\nt = threading.Thread(target=print, args=(1,)); t.start(); t.join()")["out"] == "1\n"


def test_maps_too_many_to_be_read_are_over_the_limit(hold):
    found = hold("import ctypes, mmap, os, time\nfor _ in range(12): os.mkdir('d' * 250); os.chdir('d' * 250)\n"
                 "f = open('a', 'wb+'); f.write(bytes(2000 * 4096)); f.flush()\n"
                 "m = mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE)\nat = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
                 "for k in range(0, 2000, 2): ctypes.CDLL(None).mprotect(ctypes.c_void_p(at + k * 4096), 4096, 1)\n"
                 "time.sleep(600)", seconds=8)
    assert found["end"] == "disk" and found["took"] < 6


def test_what_it_prints_to_can_be_opened_by_its_names(hold):
    found = hold("open('/dev/stdout', 'w').write('out')\nopen('/dev/stderr', 'w').write('err')")
    assert (found["out"], found["err"]) == ("out", "err")
    assert hold("import zoneinfo; print(len(zoneinfo.available_timezones()) >= 0)")["out"] == "True\n"


def test_output_is_cut_and_its_writer_stopped(hold):
    found = hold("while 1: print('a' * 9999)", output_kb=32)
    assert found["end"] == "output" and len(found["out"]) <= 32768


def test_errors_are_drained_and_their_end_is_kept(hold):
    found = hold("import sys\nsys.stderr.write('a' * 3 * 10**6)\nprint('done')\n1 / 0", seconds=10)
    assert found["end"] == "exit" and found["out"] == "done\n" and len(found["err"]) <= 1 << 16
    assert found["err"].endswith("ZeroDivisionError: division by zero\n")


def test_long_numbers_and_much_output_are_as_a_contest_has_them(hold):
    assert hold("print(len(str(10**5000)), int('7' * 6000) % 9)")["out"] == "5001 6\n"
    assert len(hold("print('a' * 3 * 10**6)", output_kb=64 << 10, seconds=10)["out"]) == 3 * 10**6 + 1


def test_the_input_can_be_opened_by_its_names_and_mapped_but_not_written(hold):
    for name in ("/dev/stdin", "/proc/self/fd/0"):
        assert hold(f"print(open('{name}').read())", "given")["out"] == "given\n"
        assert "PermissionError" in hold(f"open('{name}', 'r+').write('x')", "given")["err"]
    assert hold("import mmap; print(mmap.mmap(0, 0, access=mmap.ACCESS_READ)[:2])", "given")["out"] == "b'gi'\n"


def test_files_of_its_own_are_bounded(hold):
    huge = "f = open('a', 'wb')\nwhile 1: f.write(bytes(10**6)); f.flush()"
    assert "File too large" in (found := hold(huge, disk_mb=4))["err"] or found["end"] == "disk"
    assert "File too large" in hold("open('a', 'wb').truncate(5 << 20)", disk_mb=4)["err"]
    assert int(hold("import os\nn = 3\ntry:\n while 1: os.dup(0); n += 1\nexcept OSError: print(n)")["out"]) <= 64
    many = "import time\nfor i in range(40): open(f'{i}', 'wb').write(bytes(10**6))\ntime.sleep(600)"
    assert hold(many, disk_mb=16, seconds=5)["end"] == "disk"
    assert hold("i = 0\nwhile 1: open(f'{i}', 'w'); i += 1", disk_mb=4, seconds=5)["end"] == "disk"


def test_files_that_it_removed_but_holds_open_count_and_so_do_folders_too_deep_to_name(hold):
    held = ("import os, time\nfor i in range(30):\n f = os.open(f'{i}', os.O_RDWR | os.O_CREAT)\n os.remove(f'{i}')\n"
            " os.write(f, bytes(2 * 10**6))\ntime.sleep(600)")
    assert hold(held, disk_mb=16, seconds=5)["end"] == "disk"
    deep = "import os, time\nfor _ in range(18): os.mkdir('d' * 250); os.chdir('d' * 250)\ntime.sleep(600)"
    assert hold(deep, seconds=5)["end"] == "disk"
    assert hold("import os; os.write(0, b'x')")["code"] == 1            # its input is not for writing


def test_files_below_a_folder_that_is_renamed_again_and_again_count(hold):
    source = ("import os, time\nroot = os.getcwd()\nos.mkdir('0'); os.chdir('0')\nfor _ in range(300): os.mkdir('d'); os.chdir('d')\n"
              "if os.fork() == 0:\n n = 0\n while 1: os.rename(f'{root}/{n}', f'{root}/{n + 1}'); n += 1\n"
              "for i in range(40): open(f'{i}', 'wb').write(bytes(10**6))\ntime.sleep(600)")
    assert hold(source, disk_mb=16, seconds=8)["end"] == "disk"


def test_a_deep_tree_of_folders_and_a_daemon_are_both_cleared_away(hold):
    found = hold("import os, time\nif os.fork() == 0:\n os.closerange(0, 3); time.sleep(600); os._exit(0)\n"
                 "for _ in range(1100): os.mkdir('d'); os.chdir('d')\ntime.sleep(0.5)")
    assert found["end"] in ("exit", "disk")


def test_children_that_come_and_go_do_not_hide_what_the_others_take(hold):
    found = hold("import os, time\nif os.fork() == 0:\n x = bytearray(b'a') * 10**8\n time.sleep(600)\n"
                 "if os.fork() == 0:\n x = bytearray(b'a') * 10**8\n time.sleep(600)\nwhile 1:\n if os.fork() == 0:\n"
                 "  os.fork(); os._exit(0)\n os.wait()", memory_mb=160, seconds=10)
    assert found["end"] == "memory"


def test_nothing_is_left_of_a_program_whose_caller_is_killed(hold, tmp_path):
    folder = hold.folder / "tmp"
    folder.mkdir(exist_ok=True)
    os.chmod(folder, 0o1777)
    source = ("import os, time\nos.mkdir('a'); open('a/b', 'w'); os.mkdir('c', 0)\nif os.fork() == 0: os.setsid()\n"
              "time.sleep(600)")
    other = hold.again(TMPDIR=str(folder))
    other.process.stdin.write(json.dumps(dict(source=source, limits=dict(seconds=60))) + "\n")
    other.process.stdin.flush()
    for _ in range(100):
        if list(folder.glob("leafe-*/a/b")):
            break
        time.sleep(0.1)
    assert list(folder.glob("leafe-*/a/b"))
    other.process.kill()
    other.process.wait()
    for _ in range(100):
        if not list(folder.iterdir()):
            break
        time.sleep(0.1)
    assert not list(folder.iterdir())


def test_its_folder_goes_however_it_left_it(hold):
    hold("import os\nfor _ in range(300): os.mkdir('d'); os.chdir('d')")
    hold("import os\nos.mkdir('a'); open('a/b', 'w'); os.mkdir('a/c', 0)\nos.mkdir('e', 0)\n"
         "open('-rf', 'w'); open('f\\n', 'w')")
    assert hold("import os; os.remove('main.py'); os.rmdir(os.getcwd())")["end"] == "exit"


def test_nothing_outside_is_read_or_written(hold):
    found = hold("""
import os
def tries(what, *args):
    try: what(*args); print('ESCAPED', what, args)
    except OSError: pass
for path in (ABOUT['file'], '/etc/passwd', '/proc/self/environ', '/proc/1/environ', f"/proc/{ABOUT['pid']}/environ",
             f"/proc/{ABOUT['pid']}/mem", '/proc/self/mem', '/proc/meminfo', '/sys/kernel', '/dev/mem', '/dev/tty',
             '/dev/kmsg', '/dev/ptmx'):
    tries(os.open, path, 3); tries(os.open, path, os.O_RDONLY | os.O_TRUNC)
    tries(open, path)
    tries(open, path, 'ab')
for folder in ('/tmp', '/var/tmp', '/dev/shm', '/', '/etc', '/root', '/home', os.path.dirname(ABOUT['file']), '..'):
    tries(os.listdir, folder)
    tries(open, folder + '/x', 'w')
    tries(os.mkdir, folder + '/y')
for what, args in ((os.chmod, (0o777,)), (os.chown, (0, 0)), (os.utime, ((0, 0),)), (os.truncate, (0,)),
                   (os.rename, ('here',)), (os.link, ('here',)), (os.setxattr, ('user.a', b'b'))):
    tries(what, ABOUT['file'], *args)
tries(os.remove, ABOUT['file'])
tries(os.symlink, '/etc/passwd', 'link'); tries(open, 'link')
tries(os.symlink, ABOUT['file'], 'link2'); tries(open, 'link2')
tries(os.mkfifo, 'fifo'); tries(os.mknod, 'node')
tries(os.chroot, '.'); tries(os.open, '/proc/self/fd', os.O_RDONLY)
for library in (os.__file__, os.path.dirname(os.__file__)):
    tries(os.chmod, library, 0o777); tries(open, library + 'x', 'w'); tries(open, library, 'r+')
fd = os.open(os.__file__, os.O_RDONLY); tries(os.fchmod, fd, 0o777)
print(sorted(os.environ), open('own', 'w').write('fine'), open('own').read())
""")
    assert found["code"] == 0, found
    assert "SECRET" not in found["out"] and "swordfish" not in found["out"] and "4 fine" in found["out"]


def test_no_other_process_is_signalled_traced_or_limited(hold):
    found = hold("""
import ctypes, fcntl, os, resource, signal, socket, struct
libc = ctypes.CDLL(None, use_errno=True)
def tries(what, *args):
    try: what(*args); print('ESCAPED', what, args)
    except (OSError, PermissionError): pass
for pid in (ABOUT['pid'], ABOUT['victim'], os.getppid(), -1, 0, 1):
    for s in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM): tries(os.kill, pid, s)
tries(os.killpg, 0, 9)
x86 = os.uname().machine == 'x86_64'
for pid in (ABOUT['pid'], ABOUT['victim']):
    for nr, args in (((101 if x86 else 117), (16, pid, 0, 0)), (434, (pid, 0)), ((200 if x86 else 130), (pid, 9)),
                     ((234 if x86 else 131), (pid, pid, 9)), ((129 if x86 else 138), (pid, 9, 0)),
                     ((310 if x86 else 270), (pid, 0, 0, 0, 0, 0)), ((203 if x86 else 122), (pid, 8, b'1' * 8)),
                     ((141 if x86 else 140), (0, pid, 19)), ((312 if x86 else 272), (pid, pid, 0, 0, 0))):
        if libc.syscall(nr, *args) >= 0: print('ESCAPED', nr)
    tries(resource.prlimit, pid, resource.RLIMIT_CPU, (0, 0))
    tries(resource.prlimit, pid, resource.RLIMIT_CPU)
    for a in (*os.pipe(), *socket.socketpair()):
        for call in (fcntl.F_SETOWN, 10, 15): tries(fcntl.fcntl, a, call, pid)
        for call in (0x8901, 0x8902): tries(fcntl.ioctl, a, call, struct.pack('i', pid))
print('here')
""")
    assert found["out"] == "here\n", found


def test_there_is_no_network(hold):
    found = hold("""
import ctypes, socket
def tries(what, *args):
    try: what(*args); print('ESCAPED', what, args)
    except OSError: pass
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, 16, 17, 40):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW): tries(socket.socket, family, kind)
tries(socket.create_connection, ('127.0.0.1', ABOUT['port']), 1)
libc = ctypes.CDLL(None)
for nr in (425, 426, 427): 
    if libc.syscall(nr, 8, bytes(200)) >= 0: print('ESCAPED io_uring')
a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
tries(a.sendto, b'escaped', ABOUT['file'] + f"-socket-{ABOUT['pid']}")
tries(a.sendto, b'escaped', '\\0leafe-test')
a.send(b'inside'); assert b.recv(10) == b'inside'
import urllib.request
try: urllib.request.urlopen(f"http://127.0.0.1:{ABOUT['port']}", timeout=1); print('ESCAPED')
except OSError: print('none')
""")
    assert found["out"] == "none\n", found


def test_no_other_program_is_run_and_python_again_is_held_too(hold):
    found = hold("""
import os, subprocess, sys
for path in ('/bin/sh', '/bin/ls', '/usr/bin/env', '/usr/bin/sudo', '/bin/su', '/usr/bin/newuidmap'):
    try: subprocess.run([path]); print('ESCAPED')
    except OSError: pass
open('x', 'wb').write(open(sys.executable, 'rb').read())
try: os.execv('x', ['x', '-c', 'print("ESCAPED")'])
except OSError: pass
again = "import os, socket\\ntry: open('/etc/passwd'); print('ESCAPED')\\nexcept OSError: print('held')"
print(subprocess.run([sys.executable, '-S', '-c', again], capture_output=True, text=True).stdout)
""")
    assert found["out"] == "held\n\n", found


def test_no_privilege_is_won(hold):
    found = hold("""
import ctypes, os
libc = ctypes.CDLL(None)
def tries(what, *args):
    try: what(*args); print('ESCAPED', what, args)
    except OSError: pass
for user in (0, 1, ABOUT['user']):
    if user != os.getuid():
        tries(os.setuid, user); tries(os.setgid, user); tries(os.setresuid, user, user, user)
for flag in (0x10000000, 0x20000, 0x20000000, 0x40000000):
    if libc.unshare(flag) == 0: print('ESCAPED unshare')
    x86 = os.uname().machine == 'x86_64'
    pid = libc.syscall(56 if x86 else 220, flag | 17, 0, 0, 0, 0)
    if pid >= 0: print('ESCAPED clone', pid); os._exit(0)
    if libc.syscall(435, bytes([0, 0, 0, 16]) + bytes(60), 64) >= 0: print('ESCAPED clone3'); os._exit(0)
for call in ('mount', 'umount2', 'pivot_root', 'ptrace', 'reboot', 'swapon', 'setns', 'personality', 'memfd_create'):
    if hasattr(libc, call) and getattr(libc, call)(b'/', b'/', 0, 0, 0) == 0: print('ESCAPED', call)
print(os.getuid() != 0 and os.geteuid() != 0, os.getgroups() in ([], [os.getgid()]))
""")
    assert found["out"].startswith("True"), found


def test_threads_are_bounded(hold):
    found = hold("import os, threading, time\nn = 0\ntry:\n while 1:\n  threading.Thread(target=time.sleep, "
                 "args=(60,), daemon=True).start()\n  n += 1\nexcept RuntimeError: print(n, flush=True)\n"
                 "os._exit(0)", seconds=5)
    assert 4 <= int(found["out"]) <= 16


def test_deep_recursion_ends_the_program_alone(hold):
    found = hold("import sys\nsys.setrecursionlimit(10**9)\nclass A:\n def __getattr__(self, name): "
                 "return getattr(self, 'y')\nA().x", seconds=5)
    assert found["code"] in (-11, 1) and found["end"] == "exit"


def test_waiting_on_an_empty_input_meets_its_end(hold):
    assert "EOFError" in hold("input()")["err"]
    assert hold("import sys; print(repr(sys.stdin.read()))")["out"] == "''\n"


def test_odd_text_goes_in_and_comes_out(hold):
    assert hold("import sys; sys.stdout.buffer.write(bytes(range(256)))")["end"] == "exit"
    assert hold("print(input() == '\\u00e9\\U0001f600')", "\u00e9\U0001f600")["out"] == "True\n"
    assert "SyntaxError" in hold("x = '\udcff'")["err"] and hold("x = '\0'")["code"] == 1
