use bytes::{Buf as _, BufMut as _, Bytes};
use tollkeeper::proto::tollkeeper::{
    admin::v1::admin_service_client::AdminServiceClient,
    auth::v1::{
        LoginRequest, Tokens, ValidateTokenRequest, ValidateTokenResponse,
        auth_service_client::AuthServiceClient,
    },
    usage::v1::usage_service_client::UsageServiceClient,
};
use tonic::{
    Request, Response, Status, Streaming,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    metadata::MetadataValue,
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};
use tonic_types::StatusExt as _;

use super::TestApp;

/// Clients that call with a credential, or without one when it is empty.
impl TestApp {
    pub(crate) fn auth(
        &self,
        credential: &str,
    ) -> AuthServiceClient<InterceptedService<Channel, Bearer>> {
        AuthServiceClient::with_interceptor(self.channel.clone(), Bearer::new(credential))
    }

    pub(crate) fn usage(
        &self,
        credential: &str,
    ) -> UsageServiceClient<InterceptedService<Channel, Bearer>> {
        UsageServiceClient::with_interceptor(self.channel.clone(), Bearer::new(credential))
    }

    pub(crate) fn admin(
        &self,
        credential: &str,
    ) -> AdminServiceClient<InterceptedService<Channel, Bearer>> {
        AdminServiceClient::with_interceptor(self.channel.clone(), Bearer::new(credential))
    }

    /// Asks as a service whose token this is.
    pub(crate) async fn validate(&self, token: &str) -> Result<ValidateTokenResponse, Status> {
        validate_through(&self.channel, &self.service_key, token).await
    }
}

/// A request that carries a credential.
pub(crate) fn with_bearer<T>(message: T, credential: &str) -> Request<T> {
    let mut request = Request::new(message);
    let value = format!("Bearer {credential}").parse().expect("ASCII");
    request.metadata_mut().insert("authorization", value);
    request
}

/// Opens a session, over any connection.
pub(crate) async fn login_through(
    channel: &Channel,
    identifier: &str,
    password: &str,
) -> Result<Tokens, Status> {
    let request = LoginRequest {
        identifier: identifier.to_owned(),
        password: password.to_owned(),
    };
    let mut auth = AuthServiceClient::new(channel.clone());
    let answer = auth.login(request).await?.into_inner();
    Ok(answer.tokens.expect("tokens"))
}

/// Asks with a key whose token this is, over any connection.
pub(crate) async fn validate_through(
    channel: &Channel,
    service_key: &str,
    token: &str,
) -> Result<ValidateTokenResponse, Status> {
    let request = ValidateTokenRequest {
        token: token.to_owned(),
        include_quota: false,
        ..ValidateTokenRequest::default()
    };
    let mut auth = AuthServiceClient::new(channel.clone());
    let answer = auth
        .validate_token(with_bearer(request, service_key))
        .await?;
    Ok(answer.into_inner())
}

/// Adds `authorization: Bearer …`.
#[derive(Clone)]
pub(crate) struct Bearer(Option<MetadataValue<tonic::metadata::Ascii>>);

impl Bearer {
    fn new(credential: &str) -> Self {
        let value = format!("Bearer {credential}").parse().expect("ASCII");
        Self((!credential.is_empty()).then_some(value))
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request
                .metadata_mut()
                .insert("authorization", value.clone());
        }
        Ok(request)
    }
}

/// The machine-readable reason of an error; every error has one.
pub(crate) fn reason(status: &Status) -> String {
    let info = status.get_details_error_info();
    let info = info.unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert_eq!(info.domain, "tollkeeper");
    info.reason
}

/// Calls any RPC by its path with a message already encoded: knows no types.
pub(crate) struct Raw;

impl Raw {
    pub(crate) async fn call(
        channel: &Channel,
        path: &str,
        message: Bytes,
        credential: Option<&str>,
    ) -> Result<Response<Bytes>, Status> {
        let request = match credential {
            Some(credential) => with_bearer(message, credential),
            None => Request::new(message),
        };
        Self::send(channel, path, request).await
    }

    pub(crate) async fn send(
        channel: &Channel,
        path: &str,
        request: Request<Bytes>,
    ) -> Result<Response<Bytes>, Status> {
        let mut grpc = tonic::client::Grpc::new(channel.clone());
        grpc.ready().await.expect("connected");
        grpc.unary(request, path.parse().expect("a path"), RawCodec)
            .await
    }

    /// Opens a call whose answer may be a stream, however long.
    pub(crate) async fn open(
        channel: &Channel,
        path: &str,
        request: Request<Bytes>,
    ) -> Result<Response<Streaming<Bytes>>, Status> {
        let mut grpc = tonic::client::Grpc::new(channel.clone());
        grpc.ready().await.expect("connected");
        grpc.server_streaming(request, path.parse().expect("a path"), RawCodec)
            .await
    }
}

#[derive(Clone, Copy)]
struct RawCodec;

impl Codec for RawCodec {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(item);
        Ok(())
    }
}

impl Decoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}
