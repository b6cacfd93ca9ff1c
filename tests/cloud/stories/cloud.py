"""What the stories are told in: users of the cloud, their volumes and servers, and this host."""
import glob
import json
import os
import re
import subprocess
import time

import openstack

MARKER = b'PLAINTEXT-MARKER'
CRYPTATTACH = os.environ['CRYPTATTACH']
STATE = os.environ['STATE']


def until(what, check):
    """The first true answer; a story fails without one. On an idle machine all is there in a twentieth of that time."""
    end = time.monotonic() + 300
    while not (answer := check()):
        assert time.monotonic() < end, f'it did not come: {what}'
        time.sleep(0.5)
    return answer


def sh(command):
    done = subprocess.run(command, shell=True, executable='/bin/bash', capture_output=True, text=True)
    assert done.returncode == 0, f'{command}: {done.stdout}{done.stderr}'
    return done.stdout.strip()


def key_list():
    return json.loads(sh(f'{CRYPTATTACH} key list --json'))


def record(volume, host=''):
    """Of the last attach with the volume's key, in the audit of that host: "" or "2"."""
    with open(f'{os.path.dirname(os.environ["CRYPTATTACH_CONFIG"])}{host}/audit') as audit:
        records = [json.loads(line) for line in audit]
    return [r for r in records if r['action'] == 'attach' and r['key'].endswith(volume.key())][-1]


def verdict(volume):
    """Of the separation check, at the last attach with the volume's key."""
    return record(volume)['separation']['verdict']


def servers(command, names=''):
    """Ends servers of the cloud ("down", names), or starts what does not run ("up")."""
    return sh(f'CRYPTATTACH_OS_STATE={STATE} {os.path.dirname(__file__)}/../servers/{command} {names}')


class User:
    """A user of the cloud on the project of the same name."""

    def __init__(self, name):
        self.cloud = openstack.connect(
            auth_url=os.environ['AUTH_URL'], username=name, password=open(f'{STATE}/{name}.pw').read().strip(),
            project_name=name, user_domain_id='default', project_domain_id='default', region_name='RegionOne',
            compute_default_microversion='2.90', load_yaml_config=False, load_envvars=False)

    def cinder(self, method, path, expect=None, **body):
        answer = self.cloud.block_storage.request(path, method, json=body or None, microversion='3.71')
        if expect is None:
            assert answer.ok, f'{method} {path}: {answer.status_code} {answer.text}'
        else:
            assert answer.status_code == expect, f'{method} {path}: {answer.status_code} {answer.text}'
        return answer.json() if answer.content and answer.ok else {}

    def nova(self, method, path, **body):
        answer = self.cloud.compute.request(path, method, json=body or None, microversion='2.90')
        assert answer.ok, f'{method} {path}: {answer.status_code} {answer.text}'
        return answer.json() if answer.content else {}

    def settled(self, kind, thing, *wanted):
        """Waits for a volume, snapshot or backup to have one of these statuses, or "gone"."""
        def look():
            answer = self.cloud.block_storage.request(f'/{kind}s/{thing}', 'GET', microversion='3.71')
            self.status = 'gone' if answer.status_code == 404 else answer.json()[kind]['status']
            assert self.status in wanted or not self.status.startswith('error'), f'{kind} {thing}: {self.status}, not {wanted}'
            return self.status in wanted
        until(f"{kind} {thing} is {wanted}", look)
        return self.status

    def volume(self, kind='encrypted', size=1, wanted='available', **more):
        """A new volume that is ready."""
        if kind:
            more['volume_type'] = kind
        made = Volume(self, self.cinder('POST', '/volumes', volume={'size': size, 'name': 'story', **more})['volume']['id'])
        self.settled('volume', made.id, wanted)
        return made

    def snapshot(self, volume):
        made = self.cinder('POST', '/snapshots', snapshot={'volume_id': volume.id, 'name': 'story', 'force': True})['snapshot']['id']
        self.settled('snapshot', made, 'available')
        return made

    def image(self, data, **properties):
        glance = self.cloud.image
        image = glance.create_image(name='story', disk_format='raw', container_format='bare', allow_duplicates=True, **properties)
        sent = glance.put(f'/images/{image.id}/file', data=data, headers={'Content-Type': 'application/octet-stream'})
        assert sent.ok, sent.text
        return image.id

    def delete(self, kind, thing):
        self.cinder('DELETE', f'/{kind}s/{thing}')
        self.settled(kind, thing, 'gone')


class Volume:
    def __init__(self, user, volume):
        self.user, self.id = user, volume

    def details(self):
        return self.user.cinder('GET', f'/volumes/{self.id}')['volume']

    def key(self):
        """The key's id, in the API's own words."""
        return self.details().get('encryption_key_id')

    def has_its_key(self):
        return f'cinder/{self.key()}' in key_list()

    def file(self):
        """What is behind the volume, where a thief of disks would look. Its name is that of the last retype."""
        details = User('admin').cinder('GET', f'/volumes/{self.id}')['volume']
        return f'{STATE}/cinder/volumes/volume-{details.get("os-vol-mig-status-attr:name_id") or self.id}'

    def shows_nothing(self):
        """What the guest wrote is not to be found behind it."""
        with open(self.file(), 'rb') as file:
            while data := file.read(1 << 24):
                assert MARKER not in data, 'plaintext behind an encrypted volume'
        return True

    def action(self, **body):
        return self.user.cinder('POST', f'/volumes/{self.id}/action', **body)

    def settled(self, *wanted, **more):
        return self.user.settled('volume', self.id, *wanted, **more)

    def delete(self):
        self.user.delete('volume', self.id)


class Server:
    """A server of a user's, whose guest says on its console what each disk has, and writes the next number on it."""

    def __init__(self, user, server):
        self.user, self.id = user, server

    @classmethod
    def new(cls, user, name='guest'):
        image, flavor = user.cloud.image.find_image('guest').id, user.cloud.compute.find_flavor('tiny').id
        made = cls(user, user.cloud.compute.create_server(name=name, image_id=image, flavor_id=flavor, networks='none').id)
        made.is_up()
        return made

    @classmethod
    def of(cls, user):
        """The one that stories share; another one if a story has failed and left it with volumes, or broken."""
        if found := user.cloud.compute.find_server('guest'):
            found = user.cloud.compute.get_server(found.id)
            if found.status == 'ACTIVE' and not found.attached_volumes:
                return cls(user, found.id)
            cls(user, found.id).delete()
        return cls.new(user)

    def is_up(self):
        def look():
            server = self.user.cloud.compute.get_server(self.id)
            assert server.status != 'ERROR', server.fault
            return server.status == 'ACTIVE' and not server.task_state and any('GUEST up' in line for line in self.console())
        until('the guest has booted', look)

    def console(self):
        """Its whole lines that are the guest's own."""
        answer = self.user.cloud.compute.post(f'/servers/{self.id}/action', json={'os-getConsoleOutput': {}})
        whole, _, _ = answer.json()['output'].rpartition('\n') if answer.ok else ('', '', '')
        return [line.strip() for line in whole.splitlines() if 'GUEST' in line]

    def lines(self, volume):
        return [line for line in self.console() if volume.id[:20] in line]

    def attach(self, volume, had):
        """Attaches, and waits until the guest has found that number and written the next one."""
        seen = len(self.lines(volume))
        self.nova('POST', '/os-volume_attachments', volumeAttachment={'volumeId': volume.id})
        self.has(volume, had, seen)
        volume.settled('in-use')

    def has(self, volume, had, seen):
        """After so many lines about it, the guest has found that number and written the next one."""
        def look():
            if (lines := self.lines(volume)[seen:]) and 'wrote' in lines[-1]:
                self.sectors = int(re.search(r'sectors (\d+)', lines[-1]).group(1))
                assert lines[-1].endswith(f'had {had} wrote {had + 1}'), f'{lines}, wanted {had}'
                return True
        until(f'the guest finds {had} on the volume', look)

    def detach(self, volume):
        self.nova('DELETE', f'/os-volume_attachments/{volume.id}')
        volume.settled('available')
        until('the guest sees it go', lambda: self.lines(volume)[-1].endswith('gone'))
        assert not loops(volume), 'the device is still there'

    def reboots_hard(self, volume, had):
        """And finds that number on the volume; its console starts anew."""
        self.nova('POST', '/action', reboot={'type': 'HARD'})
        until('the reboot begins', lambda: self.user.cloud.compute.get_server(self.id).task_state)
        self.is_up()
        self.has(volume, had, 0)

    def nova(self, method, path, **body):
        return self.user.nova(method, f'/servers/{self.id}{path}', **body)

    def delete(self):
        self.user.cloud.compute.delete_server(self.id)
        until('the server is gone', lambda: not [s for s in self.user.cloud.compute.servers() if s.id == self.id])


def loops(volume):
    """The devices of this host on a volume."""
    return sh(f'losetup -n -O NAME -j {volume.file()}').split()


def mapping(volume):
    """What cryptattach says of a volume that is in use."""
    return one_mapping(loops(volume))


def one_mapping(sources, inside=''):
    """Of one of these devices; `inside` leads to another host."""
    found = [entry for entry in json.loads(sh(f'{inside} {CRYPTATTACH} list --json')) if entry['source'] in sources]
    assert len(found) == 1, found
    return found[0]


def worker(volume):
    """The process that serves its mapping."""
    for process in glob.glob('/proc/[0-9]*'):
        try:
            if b'userspace-worker' in open(f'{process}/cmdline', 'rb').read():
                if loops(volume)[0] in (os.path.realpath(fd) for fd in glob.glob(f'{process}/fd/*')):
                    return int(os.path.basename(process))
        except OSError:
            pass
    raise AssertionError('no worker')


def compute_service(host):
    found = [s for s in User('admin').cloud.compute.services() if s.binary == 'nova-compute' and s.host == host]
    return found[0] if found else None


def compute_is_up(host='host'):
    up = lambda: (service := compute_service(host)) and service.state == 'up'
    until('Nova sees its compute host', up)
    # The scheduler would find it by itself, a moment later.
    sh(f'{os.environ["CLOUD_VENV"]}/bin/nova-manage --config-file {STATE}/nova/nova.conf cell_v2 discover_hosts')
