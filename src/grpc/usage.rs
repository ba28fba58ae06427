use chrono::Utc;
use tonic::{Request, Response, Status, Streaming};

use super::{
    access::{Caller, Shown},
    convert::{self, Fields, only},
    quota, reading, recording, reservation,
};
use crate::{
    auth::Auth,
    error::Error,
    model::{Period, UserId},
    proto::tollkeeper::usage::v1::{
        BatchRecordUsageRequest, BatchRecordUsageResponse, CheckQuotaRequest, CheckQuotaResponse,
        CommitReservationRequest, CommitReservationResponse, ExportUsageRequest,
        ExtendReservationRequest, ExtendReservationResponse, GetMonthlyUsageRequest,
        GetMonthlyUsageResponse, GetQuotaRequest, GetQuotaResponse, ListTiersRequest,
        ListTiersResponse, ListUsageRecordsRequest, ListUsageRecordsResponse, QueryUsageRequest,
        QueryUsageResponse, RecordUsageRequest, RecordUsageResponse, ReleaseReservationRequest,
        ReleaseReservationResponse, ReserveQuotaRequest, ReserveQuotaResponse, StreamUsageRequest,
        usage_service_server::UsageService,
    },
    usage::{Usage, WhenFull},
};

/// `UsageService`.
pub(super) struct Handler {
    pub(super) auth: Auth,
    pub(super) usage: Usage,
}

#[tonic::async_trait]
impl UsageService for Handler {
    async fn record_usage(
        &self,
        request: Request<RecordUsageRequest>,
    ) -> Result<Response<RecordUsageResponse>, Status> {
        let event = only(|fields| {
            let event = fields.take(
                "event",
                request.into_inner().event.ok_or("must be set".into()),
            );
            convert::usage_event(fields, "event.", event?, Utc::now())
        })?;
        self.auth.user_standing(event.user_id).await?;
        Ok(Response::new(self.usage.record(event).await?.into()))
    }

    async fn batch_record_usage(
        &self,
        request: Request<BatchRecordUsageRequest>,
    ) -> Result<Response<BatchRecordUsageResponse>, Status> {
        let events = request.into_inner().events;
        let events = only(|fields| fields.take("events", recording::batch(events)))?;
        let recorded = recording::record(&self.auth, &self.usage, events, WhenFull::Refuse).await?;
        let results = recorded.into_iter().map(convert::usage_result);
        Ok(Response::new(BatchRecordUsageResponse {
            results: results.collect::<Result<_, _>>()?,
        }))
    }

    type StreamUsageStream = recording::Acknowledgements;

    async fn stream_usage(
        &self,
        request: Request<Streaming<StreamUsageRequest>>,
    ) -> Result<Response<Self::StreamUsageStream>, Status> {
        let shown = Shown::by(&request)?;
        let (auth, usage) = (self.auth.clone(), self.usage.clone());
        let requests = request.into_inner();
        Ok(Response::new(recording::acknowledge(
            auth, usage, shown, requests,
        )))
    }

    async fn check_quota(
        &self,
        request: Request<CheckQuotaRequest>,
    ) -> Result<Response<CheckQuotaResponse>, Status> {
        let (user_id, wish) = only(|fields| quota::check(fields, &request.get_ref().into()))?;
        let user = self.auth.user_standing(user_id).await?;
        let checked = self.usage.check_quota(&user, &wish).await?;
        Ok(Response::new(checked.into()))
    }

    async fn reserve_quota(
        &self,
        request: Request<ReserveQuotaRequest>,
    ) -> Result<Response<ReserveQuotaResponse>, Status> {
        let (user_id, wish) =
            only(|fields| reservation::request(fields, &request.get_ref().into()))?;
        let user = self.auth.user_standing(user_id).await?;
        let reserved = self.usage.reserve(&user, wish).await?;
        Ok(Response::new(reserved.into()))
    }

    async fn extend_reservation(
        &self,
        request: Request<ExtendReservationRequest>,
    ) -> Result<Response<ExtendReservationResponse>, Status> {
        let message = request.get_ref();
        let lifetime =
            only(|fields| fields.take("lifetime", reservation::lifetime(message.lifetime)))?;
        let user = async |user_id| self.auth.user_standing(user_id).await;
        let extended = self.usage.extend(&message.reservation, user, lifetime);
        let (reservation, expires_at) = extended.await?;
        Ok(Response::new(ExtendReservationResponse {
            reservation,
            expires_at: Some(convert::time(expires_at)),
        }))
    }

    async fn commit_reservation(
        &self,
        request: Request<CommitReservationRequest>,
    ) -> Result<Response<CommitReservationResponse>, Status> {
        let (handle, tokens, labels) =
            only(|fields| reservation::used(fields, request.into_inner()))?;
        let (committed, event_id) = self
            .usage
            .commit(&handle, tokens, labels, WhenFull::Refuse)
            .await?;
        let event_id = event_id.to_string();
        Ok(Response::new(reservation::committed(committed, event_id)))
    }

    async fn release_reservation(
        &self,
        request: Request<ReleaseReservationRequest>,
    ) -> Result<Response<ReleaseReservationResponse>, Status> {
        self.usage.release(&request.get_ref().reservation).await?;
        Ok(Response::new(ReleaseReservationResponse {}))
    }

    async fn get_quota(
        &self,
        request: Request<GetQuotaRequest>,
    ) -> Result<Response<GetQuotaResponse>, Status> {
        let text = &request.get_ref().user_id;
        let named = only(|fields| fields.parse_optional("user_id", text))?;
        let user_id = Caller::subject_of(&request, named)?;
        let standing = self.usage.quota(user_id, Utc::now()).await?;
        Ok(Response::new(quota::answer(&standing)))
    }

    async fn get_monthly_usage(
        &self,
        request: Request<GetMonthlyUsageRequest>,
    ) -> Result<Response<GetMonthlyUsageResponse>, Status> {
        let message = request.get_ref();
        let mut fields = Fields::default();
        let user_id = fields.parse_optional("user_id", &message.user_id);
        let month = fields.parse_optional("month", &message.month);
        let (named, period) = fields.finish(user_id.zip(month))?;
        let user_id = self.subject_of_sums(&request, named).await?;
        let period = period.unwrap_or_else(|| Period::containing(Utc::now()));
        Ok(Response::new(
            self.usage.month(user_id, period).await?.into(),
        ))
    }

    async fn query_usage(
        &self,
        request: Request<QueryUsageRequest>,
    ) -> Result<Response<QueryUsageResponse>, Status> {
        let (named, query) =
            only(|fields| reading::usage_query(fields, request.get_ref(), Utc::now()))?;
        let user_id = self.subject_of_sums(&request, named).await?;
        let answer = self.usage.query(user_id, query).await?;
        Ok(Response::new(reading::answer(user_id, answer)))
    }

    async fn list_usage_records(
        &self,
        request: Request<ListUsageRecordsRequest>,
    ) -> Result<Response<ListUsageRecordsResponse>, Status> {
        let message = request.get_ref();
        let mut fields = Fields::default();
        let asked = reading::list_filter(&mut fields, message);
        // An empty user_id is another list for every caller.
        let subject = match &asked {
            Some((named, _)) => Some(Caller::subject_of(&request, *named)?),
            None => None,
        };
        let filter = asked.as_ref().map(|(_, filter)| filter);
        let list = format!("usage {subject:?} {filter:?}");
        let page = fields.page(message.page_size, &message.page_token, &list);
        let ((named, filter), page) = fields.finish(asked.zip(page))?;
        let user_id = self.subject(&request, named).await?;
        let page = self
            .usage
            .records(user_id, &filter, &page)
            .await?
            .map(Into::into);
        Ok(Response::new(ListUsageRecordsResponse {
            records: page.items,
            next_page_token: page.next_token.unwrap_or_default(),
        }))
    }

    type ExportUsageStream = reading::Chunks;

    async fn export_usage(
        &self,
        request: Request<ExportUsageRequest>,
    ) -> Result<Response<Self::ExportUsageStream>, Status> {
        let asked = only(|fields| reading::export(fields, request.get_ref()))?;
        let whose = if asked.all_users {
            Caller::may_read_all(&request)?;
            None
        } else {
            Some(self.subject(&request, asked.named).await?)
        };
        let shown = Shown::by(&request)?;
        let place = self.usage.export_place(Caller::user_id_of(&request)?)?;
        let export = self.usage.export(whose, asked.filter, asked.format);
        let (auth, closing) = (self.auth.clone(), self.usage.closing());
        Ok(Response::new(reading::chunks(
            auth, place, closing, shown, export,
        )))
    }

    async fn list_tiers(
        &self,
        _request: Request<ListTiersRequest>,
    ) -> Result<Response<ListTiersResponse>, Status> {
        let tiers = self.usage.tiers();
        let default = &tiers.default_tier().name;
        let list = tiers
            .all
            .iter()
            .map(|tier| convert::tier(tier, tier.name == *default))
            .collect();
        Ok(Response::new(ListTiersResponse { tiers: list }))
    }
}

impl Handler {
    /// Whose usage is asked for. A user who is named must exist.
    async fn subject<T>(
        &self,
        request: &Request<T>,
        named: Option<UserId>,
    ) -> crate::error::Result<UserId> {
        let subject = Caller::subject_of(request, named)?;
        if named.is_some() {
            self.auth.user_standing(subject).await?;
        }
        Ok(subject)
    }

    /// As [`Self::subject`]; sums outlive their user, and so does the question for them.
    async fn subject_of_sums<T>(
        &self,
        request: &Request<T>,
        named: Option<UserId>,
    ) -> crate::error::Result<UserId> {
        match self.subject(request, named).await {
            Err(Error::UserNotFound) => {
                let subject = Caller::subject_of(request, named)?;
                match self.usage.has_sums(subject).await? {
                    true => Ok(subject),
                    false => Err(Error::UserNotFound),
                }
            }
            known => known,
        }
    }
}
