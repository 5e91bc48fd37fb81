"""Run a command with the network cut off: `python .ci/offline.py pytest`

In a network namespace of its own, with nothing in it but loopback, where the system lets us make one (`unshare -rn`,
Linux); elsewhere the command runs as it is, and that is said.
"""
import os
import shutil
import subprocess
import sys

command = sys.argv[1:]
if command[:1] == ["--inside"]:
    import fcntl
    import socket
    import struct
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:  # `ip link set lo up`, where there may be no ip
        fcntl.ioctl(s, 0x8914, struct.pack("16sh22x", b"lo", 0x1 | 0x40))  # SIOCSIFFLAGS, IFF_UP | IFF_RUNNING
    os.execvp(command[1], command[1:])
elif shutil.which("unshare") and not subprocess.run(["unshare", "-rn", sys.executable, __file__, "--inside", "true"], capture_output=True).returncode:
    os.execvp("unshare", ["unshare", "-rn", sys.executable, __file__, "--inside", *command])
else:
    print("(the network cannot be cut off here: running with it)", flush=True)
    os.execvp(command[0], command)
