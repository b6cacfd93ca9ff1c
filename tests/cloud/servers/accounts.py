"""accounts.py STATE PORT_BASE: users, roles and the catalogue in Keystone for this layer's servers. Beside the project
"demo" there is another one, "other", with a user of its own."""
import pathlib
import sys

import openstack

S, base = pathlib.Path(sys.argv[1]), int(sys.argv[2])


def password(user):
    return (S / f'{user}.pw').read_text().strip()


cloud = openstack.connect(
    auth_url=f'http://127.0.0.1:{base}/v3', username='admin', password=password('admin'), project_name='admin',
    user_domain_id='default', project_domain_id='default', region_name='RegionOne', load_yaml_config=False, load_envvars=False)
keystone = cloud.identity
keystone.create_project(name='other', domain_id='default')
for user in ('placement', 'other'):
    keystone.create_user(name=user, domain_id='default', password=password(user))
roles, users, projects = ({thing.name: thing for thing in things()} for things in (keystone.roles, keystone.users, keystone.projects))


def grant(project, user, *names):
    for name in names:
        keystone.assign_project_role_to_user(projects[project], users[user], roles[name])


for user in ('placement', 'nova', 'cinder', 'glance'):
    grant('service', user, 'admin', 'service', 'member')
for project in ('demo', 'other'):
    # "creator" may keep secrets in Barbican.
    grant(project, project, 'member', 'creator')
for kind, name, port, path in (('block-storage', 'cinder', 776, '/v3'), ('image', 'glance', 292, ''),
                               ('compute', 'nova', 774, '/v2.1'), ('placement', 'placement', 778, ''),
                               ('network', 'neutron', 696, '')):
    service = keystone.create_service(type=kind, name=name)
    for interface in ('public', 'internal', 'admin'):
        keystone.create_endpoint(service_id=service.id, interface=interface, region_id='RegionOne',
                                 url=f'http://127.0.0.1:{base + port}{path}')
