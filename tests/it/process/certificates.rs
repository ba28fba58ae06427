use std::fs;

use nix::sys::signal::Signal;

use super::{home::Home, jwks};
use crate::harness::Authority;

#[tokio::test(flavor = "multi_thread")]
async fn sighup_reads_the_certificates_again_and_keeps_the_old_ones_when_they_are_wrong() {
    let home = Home::with_database();
    let (old, new) = (Authority::new(), Authority::new());
    let file = |name| home.path().join(name);
    let (certificate, key) = (file("server.pem"), file("server.key"));
    let put = |authority: &Authority| {
        let pair = authority.server();
        fs::copy(pair.certificate, &certificate).unwrap();
        fs::copy(pair.key, &key).unwrap();
    };
    put(&old);
    let mut command = home.production(&["serve"]);
    command.env("TOLLKEEPER_TLS_CERT_FILE", &certificate);
    command.env("TOLLKEEPER_TLS_KEY_FILE", &key);
    let mut service = home.start(command);
    let address = service.address().parse().unwrap();
    assert!(!jwks(old.channel(address, None)).await.keys.is_empty());

    fs::write(&key, "no key").unwrap();
    service.signal(Signal::SIGHUP);
    service.wait_until("it says so", |service| {
        service.log().contains("the old certificates stay")
    });
    assert!(service.log().contains("tls.key_file"), "{}", service.log());
    assert!(!jwks(old.channel(address, None)).await.keys.is_empty());

    put(&new);
    service.signal(Signal::SIGHUP);
    service.wait_until("it says so", |service| {
        service.log().contains("read the certificates again")
    });
    assert!(!jwks(new.channel(address, None)).await.keys.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn health_is_asked_by_tls_where_the_listener_speaks_it() {
    let home = Home::with_database();
    let authority = Authority::new();
    let pair = authority.server();
    let tls = [
        format!("tls.cert_file={}", pair.certificate.display()),
        format!("tls.key_file={}", pair.key.display()),
    ];
    let tls = ["--set", &tls[0], "--set", &tls[1]];
    let mut service = home.start(home.production(&[&["serve"], &tls[..]].concat()));
    let address = service.address();
    let url = format!("https://{address}");
    service.wait_until("it serves", |_| {
        home.run(&["health", "--address", &url]).code == Some(0)
    });
    let listen = format!("server.listen={address}");
    let its_own = home.run(&[&["health", "--set", &listen], &tls[..]].concat());
    assert_eq!(its_own.stdout, "SERVING\n", "{}", its_own.stderr);
    let asked_plainly = home.run(&["health", "--address", &address]);
    assert_ne!(asked_plainly.code, Some(0));
    assert!(
        asked_plainly.stderr.contains(&url),
        "{}",
        asked_plainly.stderr
    );
}
