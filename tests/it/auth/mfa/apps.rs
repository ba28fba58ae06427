//! As authenticator apps see it: another's implementation of codes and URIs, and a reader of QR codes.

use rqrr::PreparedImage;
use serde_json::json;

use super::{super::python::python, Authenticator, confirm, enroll, let_time_pass, login_with};
use crate::harness::{PASSWORD, TestApp};

/// What an app makes of a URI, and the codes that it shows around now.
const READ: &str = r#"
import json, sys, time
import pyotp
given = json.load(sys.stdin)
read = pyotp.parse_uri(given["uri"])
now = int(time.time())
json.dump({
    "secret": read.secret, "issuer": read.issuer, "name": read.name,
    "digits": read.digits, "interval": read.interval, "digest": read.digest().name,
    "codes": [read.at(now + 30 * step) for step in (-1, 0, 1)],
}, sys.stdout)
"#;

#[tokio::test(flavor = "multi_thread")]
async fn apps_read_the_uri_and_their_codes_are_accepted() {
    let issuer = "Acme & Söhne GmbH (50 %)";
    let app = TestApp::spawn_with(|s| s.auth.mfa_issuer = issuer.to_owned()).await;
    for username in ["ada", "Ada.L-2_x"] {
        let user = app.user().username(username).create().await;
        let token = app.login(&user).await.access_token;
        let enrolled = enroll(&app, &token, PASSWORD).await.unwrap();
        let read = python(READ, &json!({"uri": enrolled.otpauth_uri}));
        assert_eq!(read["secret"], enrolled.secret);
        assert_eq!(read["issuer"], issuer);
        assert_eq!(read["name"], username);
        assert_eq!(
            (&read["digits"], &read["interval"]),
            (&json!(6), &json!(30))
        );
        assert_eq!(read["digest"], "sha1");
        let code = |at: usize| read["codes"][at].as_str().unwrap();
        confirm(&app, &token, code(1)).await.unwrap();
        let_time_pass(&app).await;
        login_with(&app, &user, code(1)).await.unwrap();
        // And ours in the tests are the same.
        let phone = Authenticator::enrolled(&enrolled.secret);
        assert!((-1..=2).any(|steps| phone.code_in(steps) == code(1)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_qr_code_says_what_the_uri_says() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    for _ in 0..20 {
        let enrolled = enroll(&app, &token, PASSWORD).await.unwrap();
        assert_eq!(decoded(&enrolled.qr_code_svg), enrolled.otpauth_uri);
    }
}

/// What a camera reads of the picture.
fn decoded(svg: &str) -> String {
    const SCALE: usize = 4;
    let side: usize = between(svg, "viewBox=\"0 0 ", " ").parse().unwrap();
    let path = between(svg, "fill=\"#000\" d=\"", "\"");
    let mut dark = vec![false; side * side];
    for run in path.split('M').skip(1) {
        let (x, rest) = run.split_once(' ').unwrap();
        let (y, rest) = rest.split_once('h').unwrap();
        let (length, _) = rest.split_once('v').unwrap();
        let [x, y, length] = [x, y, length].map(|number| number.parse::<usize>().unwrap());
        dark[y * side + x..y * side + x + length].fill(true);
    }
    let pixels = side * SCALE;
    let mut image = PreparedImage::prepare_from_greyscale(pixels, pixels, |x, y| {
        if dark[y / SCALE * side + x / SCALE] {
            0
        } else {
            255
        }
    });
    let grids = image.detect_grids();
    assert_eq!(grids.len(), 1);
    grids[0].decode().unwrap().1
}

fn between<'a>(text: &'a str, start: &str, end: &str) -> &'a str {
    let (_, rest) = text.split_once(start).unwrap();
    rest.split_once(end).unwrap().0
}
