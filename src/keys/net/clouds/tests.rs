use super::*;

fn find(text: &str, name: &str) -> Result<Cloud, CloudsError> {
    let folder = tempfile::tempdir().unwrap();
    let clouds = folder.path().join("clouds.yaml");
    fs::write(&clouds, text).unwrap();
    Cloud::find(&CloudConfig { cloud: Some(name.to_owned()), clouds: Some(clouds.into()), secret: None }, None)
}

const CLOUDS: &str = "
clouds:
  keys:
    auth:
      auth_url: https://keystone.example/v3
      username: cinder
      password: 'pass: word'
      project_name: keys
      user_domain_name: Default
      project_domain_id: default
    region_name: RegionOne
    interface: internalURL
    cacert: ca.pem
    compute_api_version: 2.1
  robot:
    auth_type: v3applicationcredential
    auth: {auth_url: https://keystone.example/v3, application_credential_id: abc, application_credential_secret: s}
  alone:
    auth_type: v1password
    auth: {auth_url: http://127.0.0.1:15081/auth/v1.0, username: 'keys:cinder', password: k}
  careless:
    verify: false
    auth: {auth_url: https://keystone.example/v3}
  odd:
    auth_type: v3oidcpassword
    auth: {auth_url: https://keystone.example/v3}
  empty:
  strange: {auth: null, regions: {a: [1]}, interface: 7}
  list: [1, 2]
";

#[test]
fn reads_what_openstack_clients_read() {
    let cloud = find(CLOUDS, "keys").unwrap();
    assert_eq!(cloud.auth_url, "https://keystone.example/v3");
    let wanted = cloud.wanted("key-manager");
    assert_eq!((wanted.region.as_deref(), wanted.interfaces), (Some("RegionOne"), vec!["internal".to_owned()]));
    assert!(cloud.authorities.unwrap().ends_with("ca.pem"));
    let Credentials::Password { user: Named::Name { name, domain }, password, .. } = cloud.credentials else {
        panic!()
    };
    assert_eq!((name.as_str(), domain), ("cinder", ("name", "Default".to_owned())));
    assert_eq!(password.expose(), b"pass: word");
    let Credentials::ApplicationCredential { id: Ok(id), .. } = find(CLOUDS, "robot").unwrap().credentials else {
        panic!()
    };
    assert_eq!(id, "abc");
    assert!(matches!(find(CLOUDS, "alone").unwrap().credentials, Credentials::TempAuth { .. }));
}

#[test]
fn says_what_is_wrong_and_no_secret() {
    let error = |text, name| find(text, name).err().unwrap().to_string();
    assert!(
        error(CLOUDS, "nova")
            .contains("has no cloud 'nova' (it has: alone, careless, empty, keys, list, odd, robot, strange)")
    );
    assert!(error(CLOUDS, "careless").contains("'verify: false'"));
    assert!(error(CLOUDS, "odd").contains("v3oidcpassword"));
    let broken = error("clouds:\n  keys:\n    auth: {password: hunter2\n", "keys");
    assert!(broken.contains("line") && !broken.contains("hunter2"), "{broken}");
    let wrong = error("clouds:\n  keys:\n    auth: hunter2\n", "keys");
    assert!(!wrong.contains("hunter2"), "{wrong}");
}

const LOG_IN: &str = "auth: {auth_url: https://keystone.example/v3, username: u, password: 12345, project_name: p}";

fn parse(entry: &str, texts: Texts<'_>) -> Result<Cloud, String> {
    let text = format!("clouds:\n  keys:\n    {LOG_IN}\n{entry}");
    let texts = Texts { clouds: &text, ..texts };
    Cloud::parse(texts, Path::new("/etc/openstack/clouds.yaml"), "keys".to_owned(), None, None)
        .map_err(|error| error.to_string())
}

fn wanted(entry: &str) -> (Option<String>, String, Option<String>) {
    let Wanted { url, region, interfaces } = parse(entry, Texts::default()).unwrap().wanted("object-store");
    (region, interfaces.join(" "), url)
}

#[test]
fn every_way_to_say_a_region_an_interface_and_an_end_point_is_heeded() {
    let of = |region: &str, interface: &str| (Some(region.to_owned()), interface.to_owned(), None);
    assert_eq!(wanted(""), (None, "public".to_owned(), None));
    assert_eq!(wanted("    region_name: Two\n"), of("Two", "public"));
    assert_eq!(wanted("    region-name: 'Two,One'\n"), of("Two", "public"));
    assert_eq!(wanted("    regions: [Two, One]\n    region_name: One\n"), of("Two", "public"));
    let values = "    regions: [{name: Two, values: {interface: internal, auth: {project_name: q}}}]\n";
    assert_eq!(wanted(values), of("Two", "internal"));
    let cloud = parse(values, Texts::default()).unwrap();
    assert!(
        matches!(cloud.credentials, Credentials::Password { project: Named::Name { name, .. }, .. } if name == "q")
    );
    assert_eq!(wanted("    object_store_region_name: Three\n    region_name: Two\n"), of("Three", "public"));
    assert_eq!(wanted("    endpoint_type: adminURL\n    region_name: Two\n"), of("Two", "admin"));
    assert_eq!(wanted("    interface: [internal, public]\n    region_name: Two\n"), of("Two", "internal public"));
    assert_eq!(wanted("    object-store-endpoint-type: internal\n    region_name: Two\n"), of("Two", "internal"));
    assert_eq!(wanted("    key_manager_interface: internal\n    region_name: Two\n"), of("Two", "public"));
    for name in ["object_store_endpoint_override", "object_store_endpoint"] {
        assert_eq!(wanted(&format!("    {name}: https://s/v1/AUTH_1\n")).2.as_deref(), Some("https://s/v1/AUTH_1"));
    }
    for (entry, told) in [
        ("    object_store_service_type: object-store-hdd\n", "object_store_service_type"),
        ("    key_manager_service_name: b\n", "key_manager_service_name"),
        ("    regions: Two\n", "'regions'"),
        ("    regions: [{values: {}}]\n", "'regions'"),
        ("    interface: {a: b}\n", "'interface'"),
        ("    insecure: true\n", "insecure"),
        ("    verify: ca.pem\n", "'verify'"),
        ("    trust_id: 7ed2\n", "trust_id"),
    ] {
        let error = parse(entry, Texts::default()).err().expect(entry);
        assert!(error.contains(told), "{entry}: {error}");
    }
}

#[test]
fn a_profile_and_what_is_kept_apart_belong_to_the_cloud() {
    let secure = Some("clouds:\n  keys: {auth: {password: apart}}\n  other:\n");
    let public = Some("public-clouds:\n  ours: {region_name: Two, interface: internal, auth: {username: v}}\n");
    let texts = Texts { secure, public, ..Texts::default() };
    let cloud = parse("    profile: ours\n", texts).unwrap();
    let wanted = cloud.wanted("object-store");
    assert_eq!((wanted.region.as_deref(), wanted.interfaces), (Some("Two"), vec!["internal".to_owned()]));
    let Credentials::Password { user: Named::Name { name, .. }, password, .. } = cloud.credentials else { panic!() };
    assert_eq!((name.as_str(), password.expose()), ("u", b"apart".as_slice()));
    let numeric = parse("", Texts::default()).unwrap();
    assert!(matches!(numeric.credentials, Credentials::Password { password, .. } if password.expose() == b"12345"));
    let error = parse("    profile: vexxhost\n", texts).err().unwrap();
    assert!(error.contains("profile 'vexxhost'") && error.contains("not supported"), "{error}");
}

#[test]
fn certificates_are_read_in_each_form_and_their_absence_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let key = PKey::from_ec_key(
        openssl::ec::EcKey::generate(
            &openssl::ec::EcGroup::from_curve_name(openssl::nid::Nid::X9_62_PRIME256V1).unwrap(),
        )
        .unwrap(),
    )
    .unwrap();
    let mut made = X509::builder().unwrap();
    made.set_pubkey(&key).unwrap();
    made.set_not_before(&openssl::asn1::Asn1Time::days_from_now(0).unwrap()).unwrap();
    made.set_not_after(&openssl::asn1::Asn1Time::days_from_now(1).unwrap()).unwrap();
    made.sign(&key, openssl::hash::MessageDigest::sha256()).unwrap();
    let made = made.build();
    fs::write(path("ca.pem"), made.to_pem().unwrap()).unwrap();
    fs::write(path("ca.der"), made.to_der().unwrap()).unwrap();
    fs::write(path("empty"), "").unwrap();
    let both = [made.to_pem().unwrap(), key.ec_key().unwrap().private_key_to_pem().unwrap()].concat();
    fs::write(path("both.pem"), both).unwrap();
    let with = |entry: &str| {
        let text = format!("clouds:\n  keys:\n    {LOG_IN}\n    {entry}\n");
        let texts = Texts { clouds: &text, ..Texts::default() };
        Cloud::parse(texts, &path("clouds.yaml"), "keys".to_owned(), None, None).unwrap()
    };
    for name in ["ca.pem", "ca.der"] {
        assert_eq!(with(&format!("cacert: {name}")).read_authorities().unwrap().unwrap().len(), 1);
    }
    let error = with("cacert: empty").read_authorities().unwrap_err().to_string();
    assert!(error.contains("has no certificate"), "{error}");
    assert!(with("cacert: ''").authorities.is_none());
    let home = PathBuf::from(env::var_os("HOME").unwrap());
    assert_eq!(with("cacert: ~/x.pem").authorities, Some(home.join("x.pem")));
    let ClientIdentity { chain, key } = with("cert: both.pem").read_client().unwrap().unwrap();
    assert!(chain.starts_with(b"-----BEGIN CERT") && key.starts_with(b"-----BEGIN PRIVATE KEY"));
    let error = with("{cert: ca.pem, key: empty}".trim_matches(['{', '}']).replace(", ", "\n    ").as_str());
    let error = error.read_client().err().unwrap().to_string();
    assert!(error.contains("has no private key"), "{error}");
}
