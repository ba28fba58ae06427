//! See Cargo.toml. Prints its address and serves until its standard input ends: the echo, or with the
//! argument `limits` a rate limit.

#[path = "../bench/echo.rs"]
mod echo;
mod limits;

use std::{env, error::Error, io::Read as _, thread};

use tokio::net::TcpListener;
use tonic::transport::Server;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", listener.local_addr()?);
    thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(0);
    });
    // As `Server::serve` does.
    let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
    let mut server = Server::builder();
    let server = match env::args().nth(1).as_deref() {
        Some("limits") => server.add_service(limits::Limits::new()),
        _ => server.add_service(echo::Echo),
    };
    Ok(server.serve_with_incoming(incoming).await?)
}
