//! Asks a server whether it serves, as a balancer does.

use std::{error::Error as _, io, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        self, ClientConfig, DigitallySignedStruct, SignatureScheme,
        client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        crypto::{
            WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls12_signature, verify_tls13_signature,
        },
        pki_types::{CertificateDer, ServerName, UnixTime},
    },
};
use tonic::{
    Code,
    transport::{Endpoint, Uri},
};
use tonic_health::pb::{HealthCheckRequest, health_check_response, health_client::HealthClient};
use tower::service_fn;

/// Asks the server at `address`, such as `127.0.0.1:50051`, within `deadline`; with TLS at `https://…`.
///
/// Certificates are not looked at: nothing secret is asked, and who probes seldom trusts what clients do.
///
/// # Errors
/// Why it does not serve, for people.
pub async fn probe(address: &str, service: &str, deadline: Duration) -> Result<(), String> {
    let (scheme, authority) = address.split_once("://").unwrap_or(("http", address));
    let endpoint = Endpoint::from_shared(format!("http://{authority}"))
        .map_err(|_| format!("{address} is no address such as 127.0.0.1:50051"))?;
    let ask = async {
        let channel = match scheme {
            "https" => endpoint
                .connect_with_connector(service_fn(shake_hands))
                .await
                .map_err(|_| format!("nothing that speaks TLS answers at {address}"))?,
            _ => endpoint
                .connect()
                .await
                .map_err(|_| format!("nothing answers at {address}"))?,
        };
        let request = HealthCheckRequest {
            service: service.to_owned(),
        };
        HealthClient::new(channel)
            .check(request)
            .await
            .map_err(|status| match status.code() {
                Code::NotFound => format!("the server has no service {service}"),
                // No server said that: the connection was lost.
                _ if status.source().is_some() && scheme != "https" => {
                    format!("{address} hung up; of a server with TLS it is https://{authority}")
                }
                _ => status.message().to_owned(),
            })
    };
    let answer = timeout(deadline, ask)
        .await
        .map_err(|_| "no answer in time".to_owned())??;
    match answer.into_inner().status() {
        health_check_response::ServingStatus::Serving => Ok(()),
        status => Err(status.as_str_name().to_owned()),
    }
}

async fn shake_hands(to: Uri) -> io::Result<TokioIo<TlsStream<TcpStream>>> {
    let host = to.host().unwrap_or_default().trim_matches(['[', ']']);
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let any = AnyCertificate(provider.signature_verification_algorithms);
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(any))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let stream = TcpStream::connect((host, to.port_u16().unwrap_or(443))).await?;
    let connector = TlsConnector::from(Arc::new(config));
    Ok(TokioIo::new(connector.connect(name, stream).await?))
}

/// Takes any certificate whose key the server has.
#[derive(Debug)]
struct AnyCertificate(WebPkiSupportedAlgorithms);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}
