/** Starts Swagger UI on `/docs`. The validator is a service elsewhere: off. */

SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
});
