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
