//! The echo with the product's compiler settings and allocator, in either serving shape.

use clap::ValueEnum;
use tokio::net::TcpListener;
use tollkeeper::{
    config::ServerSettings,
    server::{Incoming, Workers, serve},
};
use tonic::transport::{Server, server::TcpIncoming};

use crate::{cores, echo::Echo, process};

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Shape {
    /// One multi-threaded runtime for all connections
    Shared,
    /// One single-threaded runtime per core, as the product serves
    Workers,
}

pub(crate) fn run(shape: Shape) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    process::end_with_standard_input();
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        println!("{}", listener.local_addr()?);
        match shape {
            Shape::Shared => {
                let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
                let server = Server::builder().add_service(Echo);
                server.serve_with_incoming(incoming).await?;
            }
            Shape::Workers => {
                let streams = ServerSettings::default().max_streams;
                let workers =
                    Workers::start(cores(), 10_000, None, move |incoming: Incoming, stop| {
                        serve(incoming, streams, stop, |_| Echo)
                    })?;
                workers.accept(&listener).await?;
            }
        }
        Ok(())
    })
}
