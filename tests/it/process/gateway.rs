use http::{Method, StatusCode};
use nix::sys::signal::Signal;

use super::home::Home;
use crate::{
    gateway::upstream::Upstream,
    harness::{Edge, eventually, login_through},
};

#[tokio::test(flavor = "multi_thread")]
async fn while_it_hangs_or_is_killed_the_gateway_lets_nobody_pass_and_goes_on_when_it_is_back() {
    let home = Home::new();
    let mut service = home.serve();
    let channel = service.serving().await;
    let address = service.address();
    let [email, password] = ["admin_email", "admin_password"].map(|name| home.first_run(name));
    let tokens = login_through(&channel, &email, &password).await.unwrap();
    let authorization = format!("Bearer {}", tokens.access_token);
    let made = home.run(&["services", "create", "--name", "edge", "--scope", "gateway"]);
    let mut lines = made.stdout.lines();
    let key = lines.find_map(|line| line.strip_prefix("key "));
    let key = key.expect(&made.stderr).trim();
    let upstream = Upstream::start().await;
    let edge = Edge::start(address.parse().unwrap(), key, upstream.address).await;
    let ask = async |path: &str| {
        let method = match path.starts_with("/v1/") {
            true => Method::POST,
            false => Method::GET,
        };
        let headers = [("authorization", authorization.as_str())];
        edge.send(method, path, &headers, "").await.status
    };
    assert_eq!(ask("/").await, StatusCode::OK, "{}", edge.log());

    for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        service.signal(signal);
        let before = upstream.asked();
        for path in ["/", "/premium/x", "/tools/x", "/v1/chat/completions"] {
            let status = ask(path).await;
            assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{signal} {path}");
        }
        assert_eq!(upstream.asked(), before);
        // Where nobody is asked nothing has changed.
        assert_eq!(ask("/public/x").await, StatusCode::OK, "{signal}");
        eventually("health tells", async || {
            ask("/health").await == StatusCode::SERVICE_UNAVAILABLE
        })
        .await;
        if signal == Signal::SIGSTOP {
            service.signal(Signal::SIGCONT);
        } else {
            service.ended();
            let mut command = home.command(&["serve"]);
            command.env("TOLLKEEPER_SERVER_LISTEN", &address);
            service = home.start(command);
        }
        eventually("they pass again", async || ask("/").await == StatusCode::OK).await;
        eventually("health tells", async || {
            ask("/health").await == StatusCode::OK
        })
        .await;
    }
}
