"""Swift's rings: three devices, one zone each, three replicas, 16 partitions. In the directory that has them:
    rings.py make PORT_BASE            account and container at 127.0.0.10, object device sdbN at 127.0.0.1N
    rings.py move DEVICE ADDRESS       the object ring's device is now at another address
"""
import sys

from swift.common.ring import RingBuilder


def save(builder, name):
    builder.save(f'{name}.builder')
    builder.get_ring().save(f'{name}.ring.gz')


def make(base):
    at_one = ['127.0.0.10'] * 3
    rings = {'account': (at_one, base + 202), 'container': (at_one, base + 201),
             'object': ([f'127.0.0.1{n}' for n in (1, 2, 3)], base + 210)}
    for name, (addresses, port) in rings.items():
        builder = RingBuilder(4, 3, 1)
        for n, ip in enumerate(addresses, 1):
            builder.add_dev(dict(region=1, zone=n, ip=ip, port=port, replication_ip=ip, replication_port=port,
                                 device=f'sdb{n}', weight=1, meta=''))
        builder.rebalance(seed='cryptattach')
        save(builder, name)


def move(device, address):
    builder = RingBuilder.load('object.builder')
    for dev in builder.devs:
        if dev['device'] == device:
            dev['ip'] = dev['replication_ip'] = address
    builder.version += 1
    save(builder, 'object')


if sys.argv[1] == 'make':
    make(int(sys.argv[2]))
else:
    move(sys.argv[2], sys.argv[3])
