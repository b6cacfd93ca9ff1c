"""other_user.py DESCRIPTION SERIAL: tries every way to a key in the kernel's keyring, as whoever runs it, and prints those that
gave something. Source: keyctl(2), request_key(2)."""
import ctypes
import platform
import sys

REQUEST_KEY, KEYCTL = {'x86_64': (249, 250), 'aarch64': (218, 219)}[platform.machine()]
libc = ctypes.CDLL(None, use_errno=True)
description, serial = sys.argv[1].encode(), int(sys.argv[2], 16)
room = ctypes.create_string_buffer(1 << 14)
keyctl = lambda *numbers: libc.syscall(KEYCTL, *(n if isinstance(n, (bytes, ctypes.Array)) else ctypes.c_long(n) for n in numbers))
ways = {
    'request_key': lambda: libc.syscall(REQUEST_KEY, b'user', description, None, ctypes.c_long(0)),
    **{f'search {ring}': lambda ring=ring: keyctl(10, ring, b'user', description, 0) for ring in (-1, -2, -3, -4, -5)},
    'chown': lambda: keyctl(4, serial, 65534, 65534),
    'setperm': lambda: keyctl(5, serial, 0x3f3f3f3f),
    'describe': lambda: keyctl(6, serial, room, len(room)),
    'link': lambda: keyctl(8, serial, -3),
    'read': lambda: keyctl(11, serial, room, len(room)),
    '/proc/keys': lambda: 0 if description.decode() in open('/proc/keys').read() else -1,
}
print(*(way for way, act in ways.items() if act() >= 0), sep=', ')
