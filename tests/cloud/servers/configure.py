"""configure.py STATE PORT_BASE VENV: the configuration of MariaDB, RabbitMQ, libvirt, Glance, Cinder, Placement and Nova below STATE.
Of the second compute host's libvirt and Nova: below STATE/host2."""
import pathlib
import secrets
import sys
import textwrap
import uuid

S, base, venv = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
ip = '127.0.0.1'
keystone = f'http://{ip}:{base}'
rabbit, neutron, glance, barbican = (base + n for n in (672, 696, 292, 11))


def write(path, text, mode=0o600):
    path = S / path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text).lstrip('\n'))
    path.chmod(mode)


def password(user):
    path = S / f'{user}.pw'
    if not path.exists():
        write(path.name, secrets.token_hex(12) + '\n')
    return path.read_text().strip()


for user in ('placement', 'other', 'database'):
    password(user)
for folder in ('cinder/volumes', 'glance/images', 'glance/staging', 'glance/tasks', 'nova/instances', 'rabbit', 'libvirt/run',
               'host2/nova/instances'):
    (S / folder).mkdir(parents=True, exist_ok=True)


def log_in(user):
    return f'''auth_type = password
auth_url = {keystone}/v3
project_name = service
project_domain_id = default
user_domain_id = default
project_domain_name = Default
user_domain_name = Default
username = {user}
password = {password(user)}
region_name = RegionOne'''


def tokens(user, service):
    return f'''[keystone_authtoken]
{log_in(user)}
www_authenticate_uri = {keystone}
service_token_roles_required = true
service_token_roles = service
service_type = {service}'''


def database(name):
    return f'connection = mysql+pymysql://cloud:{password("database")}@localhost/{name}?unix_socket={S}/mariadb.sock'


# As docs/openstack.md says. Barbican's section is for the stories that have Barbican keep the keys.
KEYS = f'''[key_manager]
backend = cryptattach
[barbican]
auth_endpoint = {keystone}/v3
barbican_endpoint = http://{ip}:{barbican}'''
# No sudo and no rootwrap: all are root here.
privsep = lambda file, *names: '\n'.join(
    f'[{name}]\nhelper_command = {venv}/bin/privsep-helper --config-file {file}' for name in ('privsep_osbrick', *names))
bus = f'rabbit://guest:guest@{ip}:{rabbit}/'

# Read at each start. With sqlite, processes that write at the same time get "database is locked".
write('mariadb.sql', f"CREATE USER IF NOT EXISTS cloud@localhost IDENTIFIED BY '{password('database')}';\n" + ''.join(
    f'CREATE DATABASE IF NOT EXISTS {name};\nGRANT ALL ON {name}.* TO cloud@localhost;\n'
    for name in ('cinder', 'glance', 'placement', 'nova_api', 'nova_cell0', 'nova')))
write('rabbit/rabbitmq.conf', f'''
    listeners.tcp.1 = {ip}:{rabbit}
    loopback_users = none
    vm_memory_high_watermark.absolute = 400MB
    disk_free_limit.absolute = 50MB
    log.console = true
    log.console.level = warning
    log.file = false
''')
write('rabbit/enabled_plugins', '[].\n')
write('cinder/rootwrap.conf', f'''
    [DEFAULT]
    filters_path = {venv}/etc/cinder/rootwrap.d
    exec_dirs = /sbin,/usr/sbin,/bin,/usr/bin,/usr/local/bin,{venv}/bin
''')
write('cinder/cinder.conf', f'''
[DEFAULT]
my_ip = {ip}
host = host
transport_url = {bus}
# The machine may be busy.
rpc_response_timeout = 300
state_path = {S}/cinder
auth_strategy = keystone
api_paste_config = {venv}/etc/cinder/api-paste.ini
rootwrap_config = {S}/cinder/rootwrap.conf
# Without it a list of volumes takes no name.
resource_query_filters_file = {venv}/etc/cinder/resource_filters.json
enabled_backends = loop
default_volume_type = plain
glance_api_servers = http://{ip}:{glance}
backup_driver = cinder.backup.drivers.posix.PosixBackupDriver
backup_posix_path = {S}/cinder/backup
backup_file_size = 67108864
verify_glance_signatures = disabled
periodic_interval = 10
[loop]
volume_driver = loop_driver.LoopDriver
volume_backend_name = loop
loop_folder = {S}/cinder/volumes
[database]
{database('cinder')}
[oslo_concurrency]
lock_path = {S}/cinder/lock
[oslo_messaging_notifications]
driver = noop
[oslo_messaging_rabbit]
rabbit_quorum_queue = false
[coordination]
backend_url = file://{S}/cinder/coordination
[service_user]
send_service_user_token = true
{log_in('cinder')}
[nova]
interface = internal
{log_in('nova')}
{tokens('cinder', 'volume')}
{KEYS}
{privsep(f'{S}/cinder/cinder.conf', 'cinder_sys_admin')}
''')
write('glance/glance-api.conf', f'''
[DEFAULT]
enabled_backends = files:file
transport_url = {bus}
enabled_import_methods = [glance-direct]
[files]
filesystem_store_datadir = {S}/glance/images
[glance_store]
default_backend = files
[os_glance_staging_store]
filesystem_store_datadir = {S}/glance/staging
[os_glance_tasks_store]
filesystem_store_datadir = {S}/glance/tasks
[database]
{database('glance')}
[paste_deploy]
flavor = keystone
config_file = {venv}/etc/glance/glance-api-paste.ini
[oslo_concurrency]
lock_path = {S}/glance/lock
{tokens('glance', 'image')}
{KEYS}
''')
write('placement/placement.conf', f'''
[api]
auth_strategy = keystone
[placement_database]
{database('placement')}
sync_on_startup = true
{tokens('placement', 'placement')}
''')
# Each with the other's folder, for it migrates servers there. libvirt takes no migration_address that is 127.0.0.1.
for name, folder, other, address in (('host', '', 'host2/', '127.0.0.31'), ('host2', 'host2/', '', '127.0.0.32')):
    write(f'{folder}libvirt/libvirtd.conf', f'''
        unix_sock_dir = "{S}/{folder}libvirt/run"
        auth_unix_rw = "none"
        auth_unix_ro = "none"
        log_outputs = "2:file:{S}/log/{name}-libvirt-messages.log"
        host_uuid = "{uuid.uuid4()}"
    ''')
    # In a container there may be neither cgroups nor a second /dev. Consoles are files, so no virtlogd is needed.
    write(f'{folder}libvirt/qemu.conf', f'''
        user = "root"
        group = "root"
        dynamic_ownership = 0
        remember_owner = 0
        security_driver = "none"
        namespaces = [ ]
        cgroup_controllers = [ ]
        stdio_handler = "file"
        migration_address = "{address}"
    ''')
    write(f'{folder}nova/nova.conf', f'''
[DEFAULT]
my_ip = {ip}
host = {name}
transport_url = {bus}
# The machine may be busy.
rpc_response_timeout = 300
state_path = {S}/{folder}nova
compute_driver = libvirt.LibvirtDriver
instances_path = {S}/nova/instances
heal_instance_info_cache_interval = -1
block_device_allocate_retries_interval = 1
ram_allocation_ratio = 8
cpu_allocation_ratio = 16
disk_allocation_ratio = 8
reserved_host_memory_mb = 64
vif_plugging_is_fatal = false
vif_plugging_timeout = 0
[api]
auth_strategy = keystone
[wsgi]
api_paste_config = {venv}/etc/nova/api-paste.ini
[api_database]
{database('nova_api')}
[database]
{database('nova')}
[conductor]
workers = 1
[scheduler]
workers = 1
discover_hosts_in_cells_interval = 5
[oslo_concurrency]
lock_path = {S}/{folder}nova/lock
[oslo_messaging_notifications]
driver = noop
[libvirt]
virt_type = qemu
cpu_mode = none
connection_uri = qemu+unix:///system?socket={S}/{folder}libvirt/run/libvirt-sock
num_pcie_ports = 12
hw_machine_type = x86_64=q35
images_type = raw
# Nova formats it with an address, of which this takes nothing.
live_migration_uri = qemu+unix:///system?socket={S}/{other}libvirt/run/libvirt-sock%.0s
live_migration_inbound_addr = {address}
[workarounds]
# At a live migration Nova would take the guest's kernel for a disk with a wrong partition table.
disable_deep_image_inspection = true
[vnc]
enabled = false
[spice]
enabled = false
[serial_console]
enabled = false
[glance]
{log_in('glance')}
[cinder]
os_region_name = RegionOne
catalog_info = block-storage::publicURL
{log_in('nova')}
[placement]
{log_in('placement')}
[neutron]
endpoint_override = http://{ip}:{neutron}
{log_in('nova')}
[service_user]
send_service_user_token = true
{log_in('nova')}
{tokens('nova', 'compute')}
{KEYS}
{privsep(f'{S}/{folder}nova/nova.conf', 'nova_sys_admin')}
''')
# The WSGI application looks for it beside nova.conf.
write('nova/api-paste.ini', pathlib.Path(venv, 'etc/nova/api-paste.ini').read_text())
