//! See Cargo.toml. Prints its address and serves until its standard input ends.

#[path = "../bench/echo.rs"]
mod echo;

use std::{error::Error, io::Read as _, thread};

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
    Ok(Server::builder()
        .add_service(echo::Echo)
        .serve_with_incoming(incoming)
        .await?)
}
